"""Images of the embedded backend: the files of a workspace, kept on this machine under a name.

They lie in an EnvHub below ~/.rock, where the admin of launch.rock keeps its own too.
"""

import contextlib
import os
import pathlib
from collections.abc import Iterator

from envs.rock.errors import SandboxError, SandboxStartError
from envs.rock.images.hub import EnvHub
from envs.rock.transfer import FileStreams, Transfer
from envs.rock.wire.errors import Refusal

OWNER = "default"  # the name of an admin's first user


@contextlib.contextmanager
def open_hub() -> Iterator[EnvHub]:
    """Open the hub below ~/.rock.

    Raises:
      SandboxError: this user has no home directory.
    """
    try:
        place = pathlib.Path("~/.rock").expanduser()
    except RuntimeError as error:
        raise SandboxError(
            "images are kept below ~/.rock, and this user has no home directory (HOME is not set,"
            f" and user id {os.getuid()} has no entry in passwd); set HOME"
        ) from error
    hub = EnvHub(place)
    try:
        yield hub
    finally:
        hub.close()


async def commit(sandbox: FileStreams, image: str) -> None:
    """Save the files of a workspace under a name; see Sandbox.pack for what is kept.

    Raises:
      SandboxError: (Refusal) the name belongs to another owner.
      ValueError: the name is not valid.
    """
    with open_hub() as hub:
        digest, _ = await hub.store(sandbox.pack("."))
        hub.register(image, "environment", digest, OWNER)


async def load(sandbox: FileStreams, image: str) -> Transfer:
    """Write the files of an image into a sandbox that has just started."""
    with open_hub() as hub:
        return await sandbox.unpack(".", hub.fetch(hub.get(image).digest))


def require(image: str) -> None:
    """Check that an image of that name or digest exists.

    Raises:
      SandboxStartError: there is none, or it is a Docker image.
    """
    with open_hub() as hub:
        try:
            entry = hub.get(image)
        except Refusal as error:
            raise SandboxStartError(
                f"there is no image {image!r} on this machine; commit a sandbox to it first, or use"
                " backend='docker' for Docker's images"
            ) from error
    if entry.kind != "environment":
        raise SandboxStartError(
            f"{image!r} is the Docker image {entry.reference}; use backend='docker'"
        )


def docker_alias(image: str) -> str | None:
    """Return the Docker image that is registered under another image's name, or None.

    `EnvHub.register(name, "image", digest, owner, reference)` registers one, as the replacement of
    an image that cannot be pulled.
    """
    with open_hub() as hub:
        try:
            entry = hub.get(image)
        except Refusal:
            return None
    return entry.reference if entry.kind == "image" else None
