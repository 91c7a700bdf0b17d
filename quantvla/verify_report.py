"""What `quantvla verify` reports, and what counts as passed."""

from __future__ import annotations

import msgspec

from quantvla.fidelity.action_error import ActionError


class Thresholds(msgspec.Struct, frozen=True):
    """What counts as passed. Cosine only catches broken engines; success in closed loop decides.

    ``attention`` is the step of bfloat16 above 1: what a share of attention near a rounding boundary moves by.
    Whole chunks pass with a ``share`` of at most ``kernel_share``, a ``chunk_nrmse`` of at most ``kernel``
    or a ``velocity_nrmse`` of at most ``rounding`` times ``rounding_nrmse``: one of these is enough.
    """

    parity: float = 1e-4
    kernel: float = 1e-3
    attention: float = 2.0**-7
    kernel_share: float = 0.2
    cosine_mean: float = 0.98
    rounding: float = 2.0


DEFAULT_THRESHOLDS = Thresholds()


class MaxError(msgspec.Struct, frozen=True):
    """Largest absolute difference of a normalized action."""

    max_abs: float


class KernelError(msgspec.Struct, frozen=True):
    """Engine against reference of the same integers.

    ``max_abs``: largest difference of a kernel's output on the same input, over the largest
    magnitude of that output (of a float engine's normalized action), null for a GPU target, whose
    kernels are not run. ``attention_max_abs``: the same of own attentions, against their reference arithmetic, null
    where there are none. ``chunk_max_abs``,
    ``chunk_nrmse``: of whole normalized chunks, each program with its own roundings;
    the engine's attentions multiply float32 numbers in it as the reference's do;
    ``share``: ``chunk_nrmse`` over the quantization error. ``velocity_nrmse``: of the velocities at the
    states of the reference's chunks, so that errors do not add up over denoise steps;
    ``rounding_nrmse``: of the engine's own velocities there when its inputs change in the last bits,
    which is what correct programs may differ by. ``bfloat16_nrmse``: of whole chunks with the attentions as they run
    here to those with float32 products, null where they are the same. Null where chunks were not compared.
    """

    max_abs: float | None
    chunk_max_abs: float | None
    chunk_nrmse: float | None
    share: float | None
    velocity_nrmse: float | None = None
    rounding_nrmse: float | None = None
    attention_max_abs: float | None = None
    bfloat16_nrmse: float | None = None

    def chunk_limits_kept(self, limits: Thresholds) -> tuple[str, ...] | None:
        """Return the names of the limits on whole chunks that are kept; None where none applies."""
        if self.share is None or self.chunk_nrmse is None:
            return None
        kept = {
            "kernel_share": self.share <= limits.kernel_share,
            "kernel": self.chunk_nrmse <= limits.kernel,
        }
        if self.velocity_nrmse is not None and self.rounding_nrmse is not None:
            kept["rounding"] = self.velocity_nrmse <= limits.rounding * self.rounding_nrmse
        return tuple(name for name, holds in kept.items() if holds)


class QuantizationError(ActionError, frozen=True, kw_only=True):
    """Engine against float policy. ``velocity_*``: relative error of the velocity at each denoise
    step, on the float policy's trajectory or on the engine's own.
    """

    velocity_teacher_forced: tuple[float, ...]
    velocity_free_running: tuple[float, ...]


class VerifyReport(msgspec.Struct, frozen=True, kw_only=True):
    """The result of a verification.

    ``failed``: the parts beyond their thresholds (``parity``, ``loop``, ``kernel``, ``attention``, ``kernel
    chunks``, ``quantization``). ``loop``: largest difference between a chunk sampled in one call and the same chunk
    sampled step by step, over the largest action, by the limit of ``parity``; null for an
    engine without a graph of all steps. ``chunk_limits_kept``: which of ``kernel_share``, ``kernel`` and ``rounding``
    whole chunks keep, one is enough; null where chunks were not compared or the engine has no integers.
    ``schedule_nrmse``: relative error of the float policy at the engine's times of denoising against its
    own; null where they are the same. Engine and reference then both run at the engine's.
    """

    passed: bool = msgspec.field(name="pass")
    failed: tuple[str, ...]
    chunk_limits_kept: tuple[str, ...] | None
    parity: MaxError
    loop: float | None
    kernel: KernelError
    quantization: QuantizationError
    thresholds: Thresholds
    frames: int
    set: str
    seed: int
    integer_sites: int
    integer_bytes: int
    half_bytes: int
    schedule_nrmse: float | None
