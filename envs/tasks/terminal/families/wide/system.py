"""Wide families about the administration of a machine.

The subjects: permissions, settings, schedules, units, log rotation, accounts, ports and backups.
"""

from __future__ import annotations

from envs.tasks.terminal import checks
from envs.tasks.terminal.registry import wide_family, write_file
from envs.tasks.terminal.task import (
    Demonstration,
    Draw,
    TaskDraft,
    folder,
    gone,
    holds,
    lines,
    unchanged,
)


@wide_family("open_permissions", "system", 3)
def open_permissions(draw: Draw) -> TaskDraft:
    root = draw.word()
    modes = draw.rng.sample([0o644, 0o600, 0o640, 0o755], 3) + draw.rng.sample(
        [0o666, 0o602, 0o777, 0o646], 2
    )
    files = {f"{root}/{draw.word()}/{name}": lines(draw.word()) for name in draw.names(5, ".conf")}

    def demonstrator() -> Demonstration:
        yield f"find {root} -type f -printf '%m %p\\n'"
        yield f"find {root} -type f -perm -o=w -exec chmod o-w {{}} +"
        yield f"find {root} -type f -printf '%m %p\\n'"

    setup = lines(*(f"chmod {mode:o} {path}" for path, mode in zip(files, modes, strict=True)))
    found = [
        *(checks.permissions(path, mode & ~0o002) for path, mode in zip(files, modes, strict=True)),
        *unchanged(files),
    ]
    return TaskDraft(
        f"Some files below {root} can be written by everyone (others). Take that right away, and"
        " change no other permission.",
        files,
        found,
        demonstrator,
        setup=setup,
    )


@wide_family("release_link", "system", 3)
def release_link(draw: Draw) -> TaskDraft:
    stem = draw.word()
    major = draw.number(1, 4)
    minors = [*draw.rng.sample(range(2, 10), 2), *draw.rng.sample(range(10, 30), 2)]
    versions = draw.shuffled([f"{major}.{minor}.{draw.number(0, 9)}" for minor in minors])
    newest = max(versions, key=lambda version: [int(part) for part in version.split(".")])
    old = draw.choose(*(version for version in versions if version != newest))
    files = {f"releases/{version}/{stem}.txt": lines(f"{stem} {version}") for version in versions}

    def demonstrator() -> Demonstration:
        listed = (yield "ls releases | sort -V; readlink current").split()
        yield f"ln -sfn releases/{listed[-2]} current && cat current/{stem}.txt"

    found = [checks.link("current", f"releases/{newest}"), *unchanged(files)]
    return TaskDraft(
        "`current` is a link to one of the folders in releases. Make it a link to the one with the"
        " highest version.",
        files,
        found,
        demonstrator,
        setup=f"ln -s releases/{old} current",
    )


@wide_family("biggest_file", "system", 2)
def biggest_file(draw: Draw) -> TaskDraft:
    root = draw.word()
    folders = draw.words(3)
    sizes = draw.rng.sample(range(100, 4000), 5)
    places = [*folders, *folders[:2]]
    names = draw.names(5, ".log")
    files = {
        f"{root}/{folder}/{name}": "x" * size + "\n"
        for folder, name, size in zip(places, names, sizes, strict=True)
    }
    answer = max(files, key=lambda path: len(files[path]))

    def demonstrator() -> Demonstration:
        rows = (yield f"find {root} -type f -printf '%s %p\\n' | sort -nr | head -n 2").split()
        yield f"echo {rows[1]} > out.txt"

    return TaskDraft(
        f"Which file below {root} is the largest? Write its path, beginning with {root}/, to"
        " out.txt.",
        files,
        [holds("out.txt", answer)],
        demonstrator,
    )


@wide_family("daemon_setting", "system", 3)
def daemon_setting(draw: Draw) -> TaskDraft:
    keys = [word.capitalize() for word in draw.words(4)]
    key = keys[0]
    value = str(draw.number(100, 999))
    style = draw.choose("commented", "active", "both")
    old = {
        "commented": [f"#{key} yes"],
        "active": [f"{key} no"],
        "both": [f"# {key} says how much", f"{key} 1"],
    }[style]
    new = {
        "commented": [f"{key} {value}"],
        "active": [f"{key} {value}"],
        "both": [old[0], f"{key} {value}"],
    }[style]
    before = [f"{keys[1]} {draw.number(1, 9)}", f"#{keys[2]} {draw.word()}"]
    after = [f"{keys[3]}{key} {draw.number(1, 9)}"]

    def demonstrator() -> Demonstration:
        found = (yield f"grep -n '{key} ' daemon.conf").split("\n")
        row = next(
            row for row in reversed(found) if row.split(":")[1].lstrip("#").startswith(f"{key} ")
        )
        yield f"sed -i '{row.split(':')[0]}s/.*/{key} {value}/' daemon.conf && cat daemon.conf"

    instruction = (
        f"Set {key} to {value} in daemon.conf, where a line is `Name value`. A line of the form"
        f" `#{key} value` is the default that is switched off: put the setting in its place. Leave"
        " the other lines."
    )
    return TaskDraft(
        instruction,
        {"daemon.conf": lines(*before, *old, *after)},
        [holds("daemon.conf", lines(*before, *new, *after))],
        demonstrator,
    )


@wide_family("rotate", "system", 3)
def rotate(draw: Draw) -> TaskDraft:
    stem = draw.word()
    count = draw.number(2, 4)
    files = {
        f"{stem}.log": lines(draw.word()),
        **{
            f"{stem}.log.{number}": lines(f"{number} {draw.word()}")
            for number in range(1, count + 1)
        },
    }

    def demonstrator() -> Demonstration:
        yield "ls"
        moves = [
            f"mv {stem}.log.{number} {stem}.log.{number + 1}" for number in range(count - 1, 0, -1)
        ]
        yield " && ".join([*moves, f"mv {stem}.log {stem}.log.1", f"touch {stem}.log"])
        yield "ls"

    found = [holds(f"{stem}.log", ""), holds(f"{stem}.log.1", files[f"{stem}.log"])]
    found += [
        holds(f"{stem}.log.{number + 1}", files[f"{stem}.log.{number}"])
        for number in range(1, count)
    ]
    instruction = (
        f"Rotate {stem}.log by hand: number n becomes n+1, {stem}.log becomes {stem}.log.1, and a"
        f" new empty {stem}.log takes its place. At most {count} old logs are kept: the oldest"
        " goes."
    )
    return TaskDraft(instruction, files, [*found, gone(f"{stem}.log.{count + 1}")], demonstrator)


@wide_family("login_users", "system", 3, "awk")
def login_users(draw: Draw) -> TaskDraft:
    names = draw.words(8)
    people = [
        (
            name,
            draw.number(1000, 1999),
            draw.choose("/bin/bash", "/bin/sh", "/usr/sbin/nologin", "/bin/false"),
        )
        for name in names[:6]
    ]
    people += [
        (names[6], draw.number(1, 999), "/bin/bash"),
        (names[7], draw.number(1000, 1999), "/bin/bash"),
    ]
    answer = sorted(
        name
        for name, number, shell in people
        if number >= 1000 and shell in ("/bin/bash", "/bin/sh")
    )

    def demonstrator() -> Demonstration:
        yield "cat passwd"
        yield "awk -F: '$3 >= 1000 && $7 ~ /sh$/ { print $1 }' passwd | sort > out.txt"

    text = lines(
        *(
            f"{name}:x:{number}:{number}::/home/{name}:{shell}"
            for name, number, shell in draw.rng.sample(people, 8)
        )
    )
    instruction = (
        "passwd is a copy of /etc/passwd. Write the names of the users with an id of 1000 or more"
        " whose shell is bash or sh to out.txt, in alphabetical order."
    )
    return TaskDraft(
        instruction,
        {"passwd": text},
        [holds("out.txt", lines(*answer)), holds("passwd", text)],
        demonstrator,
    )


@wide_family("schedule", "system", 3)
def schedule(draw: Draw) -> TaskDraft:
    script = draw.word() + ".sh"
    minute = draw.number(0, 59)
    hour = draw.number(0, 23)
    when, fields = draw.rng.choice(
        [
            (f"every day at {hour:02d}:{minute:02d}", f"{minute} {hour} * * *"),
            (
                f"at {hour:02d}:{minute:02d} on the first day of each month",
                f"{minute} {hour} 1 * *",
            ),
            ("every 10 minutes, written with a step", "*/10 * * * *"),
            (f"at {minute} minutes past each hour", f"{minute} * * * *"),
            (
                f"at {hour:02d}:{minute:02d} from Monday to Friday, written as 1-5",
                f"{minute} {hour} * * 1-5",
            ),
        ]
    )
    old = lines(f"# {draw.word()}", f"5 4 * * * /opt/{draw.word()}.sh")

    def demonstrator() -> Demonstration:
        yield "cat crontab"
        yield f"echo '{fields} /opt/{script}' >> crontab"

    instruction = (
        f"Add a line to the file crontab that runs /opt/{script} {when}. Use plain numbers without"
        " leading zeros."
    )
    return TaskDraft(
        instruction,
        {"crontab": old},
        [holds("crontab", old + f"{fields} /opt/{script}")],
        demonstrator,
    )


@wide_family("service_unit", "system", 4, "python3")
def service_unit(draw: Draw) -> TaskDraft:
    name, user, before = draw.words(3)
    port = draw.number(1024, 9999)
    unit = {
        "Unit": {"Description": f"{name} server", "After": f"{before}.service"},
        "Service": {
            "ExecStart": f"/usr/bin/{name} --port {port}",
            "User": user,
            "Restart": draw.choose("always", "on-failure"),
        },
        "Install": {"WantedBy": "multi-user.target"},
    }

    def demonstrator() -> Demonstration:
        yield "cat request.txt"
        yield write_file(
            f"{name}.service",
            lines(
                *(
                    row
                    for title, keys in unit.items()
                    for row in (f"[{title}]", *(f"{key}={value}" for key, value in keys.items()))
                )
            ),
        )

    request = lines(
        f"program: /usr/bin/{name} --port {port}",
        f"description: {name} server",
        f"user: {user}",
        f"starts after: {before}.service",
        f"restart: {unit['Service']['Restart']}",
        "wanted by: multi-user.target",
    )
    instruction = (
        f"Write the systemd unit {name}.service that request.txt asks for, with sections Unit,"
        " Service and Install and only the keys that are needed."
    )
    return TaskDraft(
        instruction,
        {"request.txt": request},
        [holds("request.txt", request), checks.ini_holds(f"{name}.service", unit)],
        demonstrator,
    )


@wide_family("heaviest_process", "system", 2, "awk")
def heaviest_process(draw: Draw) -> TaskDraft:
    users = draw.words(3)
    numbers = draw.rng.sample(range(100, 9999), 8)
    memory = draw.rng.sample(range(10, 900), 8)
    rows = [
        (draw.choose(*users[:2]), number, size / 10, draw.word())
        for number, size in zip(numbers, memory, strict=True)
    ]
    rows[0] = (users[0], *rows[0][1:])
    rows.append((users[2], 99, 95.0, draw.word()))  # the heaviest of all is another user's
    answer = max((row for row in rows if row[0] == users[0]), key=lambda row: row[2])[1]

    def demonstrator() -> Demonstration:
        yield "head -n 3 ps.txt"
        found = (
            yield f"awk '$1 == \"{users[0]}\" {{ print $3, $2 }}' ps.txt | sort -nr | head -n 1"
        ).split()
        yield f"echo {found[1]} > out.txt"

    text = lines(
        "USER PID %MEM COMMAND",
        *(
            f"{user} {number} {size:.1f} {command}"
            for user, number, size, command in draw.rng.sample(rows, 9)
        ),
    )
    return TaskDraft(
        f"ps.txt lists processes. Write the PID of the process of user {users[0]} that uses the"
        " most memory to out.txt.",
        {"ps.txt": text},
        [holds("out.txt", str(answer))],
        demonstrator,
    )


@wide_family("port_conflict", "system", 4)
def port_conflict(draw: Draw) -> TaskDraft:
    services = sorted(draw.words(4))
    base = draw.number(2000, 8000)
    ports = {
        service: base + offset
        for service, offset in zip(services, draw.rng.sample([0, 1, 3, 20], 4), strict=True)
    }
    first, second = sorted(draw.rng.sample(services, 2))
    ports[second] = ports[first]
    free = next(
        port for port in range(ports[second] + 1, ports[second] + 30) if port not in ports.values()
    )
    files = {
        f"conf/{service}.ini": lines(
            f"name={service}", f"port={port}", f"backlog={draw.number(1, 99)}"
        )
        for service, port in ports.items()
    }
    new = files[f"conf/{second}.ini"].replace(f"port={ports[second]}", f"port={free}")

    def demonstrator() -> Demonstration:
        rows = (yield "grep port= conf/*.ini").split("\n")
        seen: dict[int, str] = {}
        for row in sorted(rows):
            path, port = row.split(":port=")
            if int(port) in seen:
                clash = path
                used = int(port)
            seen[int(port)] = path
        free_port = next(number for number in range(used + 1, used + 30) if number not in seen)
        yield f"sed -i s/^port=.*/port={free_port}/ {clash}"

    instruction = (
        "Two services in conf use the same port. Give the one whose name comes later in the"
        " alphabet the next higher port that no service uses."
    )
    return TaskDraft(
        instruction,
        files,
        [holds(f"conf/{second}.ini", new), *unchanged(files, f"conf/{second}.ini")],
        demonstrator,
    )


def _backup_folder(draw: Draw, root: str, plain: int) -> tuple[dict[str, str], str]:
    """Draw the files of a folder and the name of its inner one, where a name has a space."""
    inner = draw.word()
    names = [*draw.names(plain), f"{inner}/{draw.word()} {draw.word()}.txt"]
    return {f"{root}/{name}": lines(draw.word()) for name in names}, inner


@wide_family("backup_script", "system", 4, runs_agent_code=True)
def backup_script(draw: Draw) -> TaskDraft:
    """Draw a folder to try the script on, and a hidden one on which it is judged."""
    source, hidden, target = draw.words(3)
    counts = draw.rng.sample(range(1, 7), 2)
    files, _ = _backup_folder(draw, source, counts[0])
    hidden_files, inner = _backup_folder(draw, hidden, counts[1])
    example = draw.number(8, 99)

    def demonstrator() -> Demonstration:
        yield f"find {source} -type f"
        yield write_file(
            "backup.sh",
            """\
set -e
[ -d "$1" ] || { echo "no folder $1" >&2; exit 2; }
mkdir -p "$2"
cp -r "$1"/. "$2"
echo "$(find "$1" -type f | wc -l) files"
""",
        )
        yield f"bash backup.sh {source} ${{TMPDIR:-/tmp}}/trial"

    copied = {path.removeprefix(f"{hidden}/"): text for path, text in hidden_files.items()}
    found = [
        *unchanged(files),
        gone(target),
        *checks.hidden_files(hidden_files),
        checks.prints(f"{len(copied)} files", "/bin/bash", "backup.sh", hidden, target),
        folder(target),
        checks.tree(target, copied, [inner]),
        *(holds(f"{target}/{path}", text) for path, text in copied.items()),
        *unchanged(hidden_files),
        "refuses /bin/bash backup.sh no-such-folder /tmp/none",
    ]
    instruction = (
        "Write backup.sh: `bash backup.sh FROM TO` copies all that is in the folder FROM into the"
        " folder TO, which it makes, and prints how many files FROM has, for example"
        f" `{example} files`. It ends with an error where FROM is missing. Do not leave a folder"
        f" {target} behind."
    )
    return TaskDraft(instruction, files, found, demonstrator)
