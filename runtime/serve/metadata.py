"""What a server says about its engine in the first frame, before it is asked anything."""

from __future__ import annotations

import msgspec

from quantvla.runtime.manifest import ActionSpec, CameraSpec, Manifest, VectorSpec

PROTOCOL = 1


class ServerMetadata(msgspec.Struct, frozen=True, kw_only=True):
    """The metadata frame: what the engine is, what it reads and what it answers with.

    ``protocol`` counts changes that an older client could not read; unknown fields are ignored.
    ``noise_shape`` is the shape of the optional ``noise`` of a request; ``max_message_bytes`` the
    size from which the server refuses a request.
    """

    protocol: int
    server: str
    family: str
    recipe: str
    target: str
    checkpoint_sha256: str
    cameras: tuple[CameraSpec, ...]
    state: VectorSpec
    task_key: str
    action: ActionSpec
    noise_shape: tuple[int, ...]
    denoise_steps: int
    max_message_bytes: int


def describe(manifest: Manifest, *, server: str, max_message_bytes: int) -> ServerMetadata:
    """Return the metadata of a server that runs the engine of ``manifest``."""
    return ServerMetadata(
        protocol=PROTOCOL,
        server=server,
        family=manifest.family,
        recipe=manifest.recipe,
        target=manifest.target,
        checkpoint_sha256=manifest.source.checkpoint_sha256,
        cameras=manifest.cameras,
        state=manifest.state,
        task_key=manifest.task_key,
        action=manifest.action,
        noise_shape=manifest.sampler.noise_shape,
        denoise_steps=len(manifest.sampler.timesteps),
        max_message_bytes=max_message_bytes,
    )
