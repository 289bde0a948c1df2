"""Names of images on this machine.

Images of the embedded backend: the files of a workspace under a name, kept on this machine in an
EnvHub of its own (~/.rock, where launch.rock's admin keeps its too).
"""

import contextlib
import pathlib

from envs.rock.errors import SandboxStartError
from envs.rock.sandbox import Sandbox, Transfer
from envs.rock.service.hub import EnvHub
from envs.rock.wire import archive
from envs.rock.wire.api import Refusal

OWNER = "default"  # as the first user of an admin is called


@contextlib.contextmanager
def hub():
    one = EnvHub(pathlib.Path("~/.rock").expanduser())
    try:
        yield one
    finally:
        one.close()


async def keep(sandbox: Sandbox, image: str) -> None:
    """Regular files of the workspace, with their modes.

    SandboxError (Refusal) for a name that is another's, ValueError for one that makes no sense.
    """
    with hub() as place:
        digest, _ = await place.store(archive.pack(sandbox, "."))
        place.register(image, "environment", digest, OWNER)


def check(image: str) -> None:
    """SandboxStartError where there is none of that name or digest."""
    with hub() as place:
        try:
            entry = place.get(image)
        except Refusal as error:
            raise SandboxStartError(
                f"there is no image {image!r} on this machine; commit a sandbox to it first, or use"
                " backend='docker' for Docker's images"
            ) from error
    if entry.kind != "environment":
        raise SandboxStartError(
            f"{image!r} is the Docker image {entry.reference}; use backend='docker'"
        )


def alias(image: str) -> str | None:
    """The Docker image that is registered here under another image's name (EnvHub.register(name,
    "image", digest, owner, reference)): it stands for one that cannot be pulled.
    """
    with hub() as place:
        try:
            entry = place.get(image)
        except Refusal:
            return None
    return entry.reference if entry.kind == "image" else None


async def bring(sandbox: Sandbox, image: str) -> Transfer:
    """The files of an image, into a sandbox that has just started."""
    with hub() as place:
        return await archive.unpack(sandbox, ".", place.fetch(place.get(image).digest))
