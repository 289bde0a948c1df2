"""Shell scripts that run inside a container.

The image must have sh, cat, chmod, cp, mkdir, mkfifo, readlink, rm, find, stat and tar (GNU's or
busybox's). The scripts are run by copies of the image's shells in /run/rock, which belong to the
keeper (a user id that is not the agent's) and may be executed but not read. The kernel makes a
process of such a program undumpable: no process of the agent, which has the same user id, can open
its memory, environment or descriptors. Each script first writes its process id, in a line on
stdout, before anything of the agent's runs.
"""

import os

from envs.rock.host import shell

PLACE = "/run/rock"
KEEPER = 65534  # the user id of our own programs and files, which no command may kill or open
# Exit codes of scripts about files.
OUTSIDE = 50
MISSING = 51
NOT_REGULAR = 52
DENIED = 53
NO_SPACE = 54
FILE_TOO_LARGE = 153  # 128 + SIGXFSZ
REASONS = {
    OUTSIDE: "outside",
    MISSING: "missing",
    NOT_REGULAR: "not_regular",
    DENIED: "denied",
    NO_SPACE: "no_space",
    FILE_TOO_LARGE: "no_space",
}

# Process 1 has the agent's user id, so it may kill all of the agent's processes. It does that when
# the engine sends it KILL_ALL: in one system call, from which no fork escapes and which no process
# can prevent. (An exec that kills could be killed first.) It is undumpable too; the kernel keeps
# from it every signal of its own container that it does not handle, and it ignores those that
# shells handle. It collects orphans by ignoring their ends. It ends, and the container with it, as
# soon as the other end of its input is closed, for example when its manager dies. A signal makes
# dash's `read` fail once, sometimes before the trap runs, so only many failures in a row are the
# end.
KILL_ALL = "SIGUSR1"
INIT = """cd /workspace && mkdir .init && cp /bin/sh .init/sh && chmod 111 .init/sh &&
exec .init/sh -c '
trap "" 1 2 3 4 5 6 7 8 11 12 13 14 15 17 24 25 26 31
trap "failed=0; kill -9 -1" USR1
rm -rf .init
cd /
echo ready
while read -r line || [ $((failed += 1)) -lt 50 ]; do :; done 2>/dev/null'"""
# Copies the image's shells, and prints the path of its bash.
KEEP = (
    f"cd {PLACE} && umask 022 && cp /bin/sh sh && chmod 711 sh && bash=$(command -v bash) && cp"
    ' "$bash" bash && chmod 711 bash; echo "$bash"; [ -e sh ]'
)
# Counts the processes, this one and process 1 included.
COUNT = "count=0; for one in /proc/[0-9]*; do count=$((count + 1)); done; echo $count"

# Prints which variant of a tool the image has, and "undumpable" if the kernel keeps a child from
# looking into its undumpable parent.
SURVEY = """
find / -maxdepth 0 -printf '%y\\0' >/dev/null 2>&1 && echo printf
tar --version 2>/dev/null | { read -r line; case $line in *GNU*) echo gnu_tar;; esac; }
{ cat /proc/$$/environ || cat /proc/$$/maps; } >/dev/null 2>&1 || echo undumpable
[ -e /proc/self/task ] && echo ok"""

# Limits the agent's own processes, so that ours can still start when it has reached the limit.
# dash calls that limit -p.
_LIMIT = "{ ulimit -u %d || ulimit -p %d; } 2>/dev/null"
_HOME = "cd /workspace 2>/dev/null || { chmod 700 /workspace; cd /workspace; }"

# Runs one command. $1: the shell, $2: the command. When it has ended and no other program was
# started from outside the container (those have no parent in it), all that is left is killed: at
# once, since a process that holds a stream open would keep the engine waiting.
_RUN = """
trap : INT
exec 7>&2 2>/dev/null
(exec "$1" -c -- "$2" "${1##*/}" 2>&7 7>&-)
code=$?
others=
for stat in /proc/[0-9]*/stat; do
  read -r line < $stat || continue
  pid=${line%% *}; set -- ${line##*) }
  [ "$2" = 0 ] && [ $pid != $$ ] && [ $pid != 1 ] && others=yes
done 2>/dev/null
[ "$others" ] || kill -9 -1
exit $code"""

# Sends a signal. $1: the signal, $2: a process, $3: "whole" for it and its session too, $4: its
# children to spare, with all below them.
SIGNAL = """
signal=$1 root=$2 whole=$3 older=" $4 " all= found=" "
for stat in /proc/[0-9]*/stat; do
  read -r line < $stat || continue
  pid=${line%% *}; set -- ${line##*) }
  all="$all $pid:$2:$4"
done 2>/dev/null
more=yes
while [ "$more" ]; do
  more=
  for one in $all; do
    pid=${one%%:*} session=${one##*:} parent=${one#*:}; parent=${parent%%:*}
    case "$found$older" in *" $pid "*) continue;; esac
    case "$found" in *" $parent "*) ;; *)
      [ $parent = $root ] ||
        { [ "$whole" ] && { [ $pid = $root ] || [ $session = $root ]; }; } || continue;;
    esac
    found="$found$pid "; more=yes
  done
done
[ "$found" = " " ] || kill -s $signal $found 2>/dev/null
:"""

# A session: bash (4.4 or later, for `mapfile -d`) runs records from its stdin, see host/shell.py,
# and reports to a pipe with a reader of another user id. A mark, new each time, goes to both of its
# output streams after each command, so that their reader knows where the command's output ends; the
# exit code never travels there.
SESSION_COMMANDS = 10  # the descriptors on which bash saves what the loop's redirections replace
SESSION_REPORTS = 11
_SESSION_OUTPUTS = (12, 13)
SESSION = f"""
IFS= read -r ROCK_DOOR
exec 4>"$ROCK_DOOR" 5>&1 6>&2
printf '%d \\0' $$ >&4
unset ROCK_DOOR
{shell.loop(SESSION_COMMANDS, SESSION_REPORTS, "</dev/null 4>&- 5>&- 6>&-")}"""
# Adds the shell's children to a report.
CHILDREN = "\\builtin read -r 'ROCK[2]' < /proc/$$/task/$$/children || \\builtin :;"
# Reads the pipe of a session's reports. Its name comes by stdin, since every process can read a
# command line, and is removed before the session's first command begins.
DOOR = (
    'IFS= read -r door && umask 0 && mkfifo -m 622 "$door" && echo there && exec 3<"$door" && rm'
    ' "$door" && exec cat <&3'
)

# Runs a verifier's script, which comes by stdin and is kept only in the shell's memory.
VERIFY = 'ROCK_SCRIPT=$(cat); exec </dev/null; eval "$ROCK_SCRIPT"'

# Follows links one by one: an absolute one, or one that leads out, is refused. $1: the path (see
# `spelled`), $2: "make" to create directories on the way.
_RESOLVE = f"""
resolve() {{
  left=$(printf '%bx' "$1") at=. hops=0; left=${{left%x}}
  while [ "$left" ]; do
    case $left in */*) part=${{left%%/*}} left=${{left#*/}};; *) part=$left left=;; esac
    case $part in
      ''|.) continue;;
      ..) [ "$at" = . ] && exit {OUTSIDE}; at=${{at%/*}}; continue;;
    esac
    if [ -L "$at/$part" ]; then
      hops=$((hops + 1)); [ $hops -gt 40 ] && exit {OUTSIDE}
      target=$(readlink "$at/$part" && echo x) || exit {MISSING}
      target=${{target%?x}}
      case $target in /*) exit {OUTSIDE};; esac
      left=$target${{left:+/$left}}
    else
      at=$at/$part
      if [ "$2" ] && [ "$left" ] && ! [ -e "$at" ]; then
        said=$(mkdir "$at" 2>&1) || fail "$said"
      fi
    fi
  done
}}
fail() {{
  case $1 in *[Ss]pace*|*large*) exit {NO_SPACE};; esac
  [ -d "${{at%/*}}" ] && exit {DENIED}
  exit {MISSING}
}}
"""
READ = (
    _RESOLVE
    + f"""
resolve "$1"
[ -f "$at" ] || {{ [ -e "$at" ] && exit {NOT_REGULAR}; exit {MISSING}; }}
exec cat < "$at" || exit {DENIED}"""
)
WRITE = (
    _RESOLVE
    + f"""
resolve "$1" make
[ -e "$at" ] && ! [ -f "$at" ] && exit {NOT_REGULAR}
[ -w "$at" ] || ! [ -e "$at" ] || chmod u+w "$at"
said=$({{ cat > "$at"; }} 2>&1) || fail "$said"
exec chmod "$2" "$at" """
)
_LIST_GNU = "exec find . -mindepth 1 -printf '%y %s %m %P\\0' 2>/dev/null"
_LIST_PLAIN = """exec find . ! -name . -exec sh -c 'for f do
  if [ -L "$f" ]; then kind=l
  elif [ -d "$f" ]; then kind=d
  elif [ -f "$f" ]; then kind=f
  else kind=o; fi
  about=$(stat -c "%s %a" "$f") && printf "%s %s %s\\0" $kind "$about" "${f#./}"
done' sh {} + 2>/dev/null"""

# Makes files readable by their owner: nobody in the container has the right to read them otherwise.
_KEEP_TREE = """cd / && find %s -type d ! -perm -500 -exec chmod u+rx {} ';' 2>/dev/null
find %s -type f ! -perm -400 -exec chmod u+r {} + 2>/dev/null
"""

UNPACK = "exec tar -xpf - -C / 2>&1"
COMMITTED_FILES = "/.rock.tar"  # in an image, see DockerBackend.commit
BRING_COMMITTED = f"exec tar -xpf {COMMITTED_FILES} -C / 2>&1"
EMPTY = (
    "cd / && find workspace -type d ! -perm -700 -exec chmod u+rwx {} ';' ; find workspace"
    " -mindepth 1 -delete"
)

STATUS = """
cd /sys/fs/cgroup
read -r memory < memory/memory.usage_in_bytes || read -r memory < memory.current
read -r pids < pids/pids.current || read -r pids < pids.current
read -r nanoseconds < cpuacct/cpuacct.usage || read -r name microseconds < cpu.stat
echo "${memory:-x} ${pids:-x} ${nanoseconds:-${microseconds:-0}000}"
stat -f -c '%S %b %f %c %d' /workspace /tmp"""

# Connects stdin and stdout to a port. $1: the port.
CONNECT = "exec 2>/dev/null 3<>/dev/tcp/127.0.0.1/$1 4<&0 || exit 1; cat <&4 >&3 & cat <&3; kill $!"


def run(pids: int) -> str:
    """Return the script that runs one command.

    Args:
      pids: how many processes the agent may have.
    """
    return _HOME + "\n" + _LIMIT % (pids, pids) + _RUN


def session(pids: int) -> str:
    """Return the script of a session's shell; see `run` for the argument."""
    return _HOME + "\n" + _LIMIT % (pids, pids) + SESSION


def pack_tree(tools: frozenset[str]) -> str:
    """Return the script that writes a tar of everything below a directory ($1).

    Args:
      tools: what SURVEY found.
    """
    enter = f'resolve "$1"; [ -d "$at" ] || exit {MISSING}; cd "$at" || exit {DENIED}\n'
    times = "--format=posix --pax-option=delete=atime,delete=ctime" if "gnu_tar" in tools else ""
    return _RESOLVE + enter + f"exec tar {times} -cf - . 2>/dev/null"


def write_mark(mark: bytes) -> bytes:
    """Return a session's record that writes a mark to both of its output streams."""
    writes = [b"\\builtin printf '%%s' '%b' >&%d;" % (mark, one) for one in _SESSION_OUTPUTS]
    return shell.record(b" ".join(writes))


def verify(pids: int) -> str:
    """Return the script that runs a verifier's script; see `run` for the argument."""
    return _HOME + "\n" + _LIMIT % (pids, pids) + "\n" + VERIFY


def in_workspace(script: str) -> str:
    """Return a script that runs in /workspace."""
    return _HOME + "\n" + script


def list_files(tools: frozenset[str]) -> str:
    """Return the script that lists a directory ($1).

    Args:
      tools: what SURVEY found.
    """
    enter = f'resolve "$1"; [ -d "$at" ] || exit {MISSING}; cd "$at" || exit {DENIED}\n'
    show = _LIST_GNU if "printf" in tools else _LIST_PLAIN
    return _RESOLVE + enter + show


def pack(tools: frozenset[str], directories: str) -> str:
    """Return the script that writes a tar of directories of the root.

    GNU's tar gets the names in them, because it would also set the modes of the directories.

    Args:
      tools: what SURVEY found.
      directories: names, separated by spaces.
    """
    write = f"exec tar -cf - {directories} 2>/dev/null"
    if "gnu_tar" in tools:
        names = f"find {directories} -mindepth 1 -maxdepth 1 -print0"
        # A name that is removed meanwhile is no failure.
        write = f"{names} | tar -S --ignore-failed-read --null -T - -cf - 2>/dev/null"
    return _KEEP_TREE % (directories, directories) + write


def spelled(path: str) -> str:
    """Return a path as printf's %b reads it.

    The engine passes only text, while a file's name may hold any bytes.
    """
    spelling = []
    for byte in os.fsencode(path):
        is_plain = 32 <= byte < 127 and byte != ord("\\")
        spelling.append(chr(byte) if is_plain else f"\\0{byte:03o}")
    return "".join(spelling)
