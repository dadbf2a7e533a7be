"""Which devices a command runs on, with whom, and where compiled programs are kept."""

import argparse
import contextlib
import os
from pathlib import Path

import jax

from liveavatar_jax.parallel import hosts
from liveavatar_jax.types import LiveAvatarError


def prepare(args: argparse.Namespace) -> None:
    """Chooses the devices, joins the other processes, and keeps compiled programs in a private
    folder between runs, as the flags of the command say.

    Raises LiveAvatarError where there is no such device.
    """
    device = args.device
    if device is not None:
        jax.config.update("jax_platforms", {"gpu": "cuda"}.get(device, device))
    if getattr(args, "fake_devices", None) is not None:
        hosts.fake_devices(args.fake_devices)
    if hasattr(args, "coordinator"):
        hosts.initialise(
            args.coordinator, args.processes, args.process_id, cluster=args.cluster,
            join_timeout=args.join_timeout, heartbeat=args.heartbeat,
        )  # fmt: skip
    try:
        jax.devices()
    except (RuntimeError, AssertionError):  # JAX asserts when none of the named kind starts
        named = os.environ.get("JAX_PLATFORMS")
        asked = f"--device {device}" if device else f"JAX_PLATFORMS={named}"
        raise LiveAvatarError(
            f"{asked}: no such device here; install the extra for it "
            "(liveavatar-jax[cuda] or liveavatar-jax[tpu]) or use --device cpu"
        ) from None
    if len(jax.local_devices()) > 1 and jax.default_backend() == "cpu":
        return  # where a program that comes from the cache may wait for itself for ever
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    cache = Path(home) / "liveavatar-jax"
    with contextlib.suppress(OSError):  # a read-only home costs compile time, nothing else
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        jax.config.update("jax_compilation_cache_dir", str(cache / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
