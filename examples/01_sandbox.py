"""Run commands in a sandbox.

python -m examples.01_sandbox

No package or daemon is needed. Where user namespaces are refused, "best_available" falls back to
weaker tiers; `sandbox.guarantees` says what is enforced.
"""

import asyncio

from envs.rock import Sandbox, SandboxConfig


async def main() -> None:
    config = SandboxConfig(memory_mb=256, disk_mb=16, isolation="best_available")
    async with Sandbox(config) as sandbox:
        print("enforced here:", ", ".join(sorted(sandbox.guarantees)))

        result = await sandbox.execute("echo hello > greeting; cat greeting; exit 3", timeout=10)
        print("output:", result.stdout.strip(), "| exit code:", result.exit_code)

        async with await sandbox.create_session() as shell:  # a bash that lives on
            await shell.run("mkdir work; cd work; export NAME=agent")
            answer = await shell.run("echo $NAME is in $(basename $PWD)")
            print("session:", answer.stdout.strip())

        endless = await sandbox.execute("while :; do :; done", timeout=1)
        print("stopped by:", ", ".join(endless.limits_hit))

        refused = await sandbox.execute("exec 3<>/dev/tcp/8.8.8.8/53")
        print("the network was refused:", refused.exit_code != 0)

        # Kills every process of the agent first; the agent can never read the script.
        verdict = await sandbox.verify("grep -q hello greeting && echo 1 || echo 0")
        print("verdict:", verdict.stdout.strip())


if __name__ == "__main__":
    asyncio.run(main())
