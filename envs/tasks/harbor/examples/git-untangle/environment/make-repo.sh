set -e
export GIT_AUTHOR_DATE=2024-03-05T10:00:00Z GIT_COMMITTER_DATE=2024-03-05T10:00:00Z
git init -q -b main .
git config user.name dev
git config user.email dev@example.org
echo one > a.txt && echo keep > c.txt && git add . && git commit -q -m start
git branch release
echo two >> c.txt && git commit -qam 'extend c'
echo three >> a.txt && echo new > b.txt && git add . && git commit -q -m wip
