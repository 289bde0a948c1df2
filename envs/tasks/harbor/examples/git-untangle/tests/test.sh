#!/bin/bash
cd /app/repo 2> /dev/null || { echo 0 > /logs/verifier/reward.txt; exit 0; }
git() { env GIT_CONFIG_GLOBAL=/dev/null GIT_CONFIG_NOSYSTEM=1 GIT_NO_REPLACE_OBJECTS=1 /usr/bin/git --git-dir=.git -c core.fsmonitor=false "$@" 2> /dev/null; }
subject() { git cat-file commit "$1" | sed -n '/^$/{n;p;q}'; }
right() {
    [ "$(git symbolic-ref HEAD)" = refs/heads/main ] && [ "$(git rev-list main | wc -l)" = 4 ] &&
    [ "$(subject main)" = 'add b' ] && [ "$(subject main~1)" = 'change a' ] && [ "$(subject main~2)" = 'extend c' ] &&
    [ "$(git diff-tree -r --name-status main~2 main~1)" = "$(printf 'M\ta.txt')" ] && [ "$(git diff-tree -r --name-status main~1 main)" = "$(printf 'A\tb.txt')" ] &&
    [ "$(git cat-file blob main:a.txt)" = "$(printf 'one\nthree')" ] && [ "$(git cat-file blob main:b.txt)" = new ] &&
    [ "$(git rev-parse release)" = "$(git rev-parse main~3)" ] && [ "$(cat a.txt)" = "$(printf 'one\nthree')" ] && [ "$(cat b.txt)" = new ] && [ "$(ls -A)" = "$(printf '.git\na.txt\nb.txt\nc.txt')" ]
}
if right; then echo 1 > /logs/verifier/reward.txt; else echo 0 > /logs/verifier/reward.txt; fi
