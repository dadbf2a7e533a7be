"""What one tick of the stream costs, counted from the config: operations, and bytes of memory.

Counted by hand because XLA counts the body of a loop once, and not at all for a GPU it has not
got. A product of m x k by k x n is 2·m·k·n operations; element-wise work is left out, it is
neither counted as operations nor as traffic of its own (a fused program reads the input of a
product and writes its output once). So bytes are the least that must move.
"""

import dataclasses

from liveavatar_jax.config import DiTConfig, ModelConfig, VAEConfig
from liveavatar_jax.models.cells import HINTS, MOTION
from liveavatar_jax.models.condition import MOTION_FRAMES


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one device, for one call."""

    flops_matrix: float = 0.0  # products with weights: they run at the peak of the weights' dtype
    flops_attention: float = 0.0  # products of activations: always 16-bit
    bytes_weights: float = 0.0
    bytes_cache: float = 0.0  # keys and values read and written
    bytes_activations: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Cost(*(a + b for a, b in pairs))

    def __mul__(self, times: float | int) -> "Cost":
        return Cost(*(a * times for a in dataclasses.astuple(self)))

    @property
    def flops(self) -> float:
        return self.flops_matrix + self.flops_attention

    @property
    def bytes(self) -> float:
        return self.bytes_weights + self.bytes_cache + self.bytes_activations

    def split(self, tensor: int = 1, sequence: int = 1) -> "Cost":
        """The share of one of `tensor` x `sequence` devices, split evenly: the best case.

        Weights divide over `tensor` alone, everything else over both.
        """
        share = self * (1 / (tensor * sequence))
        return dataclasses.replace(share, bytes_weights=self.bytes_weights / tensor)


@dataclasses.dataclass(frozen=True)
class Size:
    """What is streamed: a picture of height × width latents for `rows` sessions at once."""

    height: int
    width: int
    rows: int = 1
    weight_bytes: int = 2  # of a weight: 2 = bf16, 1 = int8 or fp8

    @property
    def frame(self) -> int:
        """Tokens of a latent frame."""
        return (self.height // 2) * (self.width // 2)

    @property
    def packed(self) -> tuple[int, int, int]:
        """Tokens of the packed motion frames at full, half and quarter resolution."""
        h, w = self.height, self.width
        return self.frame, (h // 4) * (w // 4), MOTION_FRAMES // 4 * (h // 8) * (w // 8)

    def sink(self, motion: bool) -> int:
        """Condition tokens: the reference, and the motion frames."""
        return self.frame + (sum(self.packed) if motion else 0)


def forward(cfg: ModelConfig, size: Size) -> Cost:
    """One denoising step of one block against a full ring: a tick of a stage.

    Without what is made once a stream (`text`, levels), and the audio adapter (3 GFLOP a block).
    """
    dit, frames, rows = cfg.dit, cfg.stream.block_frames, size.rows
    tokens = frames * size.frame
    seen = cfg.stream.ring_blocks * tokens + size.sink(cfg.stream.motion)
    patch = 4 * dit.latent_channels
    ends = linear(size, rows * tokens, patch, dit.dim) + linear(size, rows * tokens, dit.dim, patch)
    kept = Cost(bytes_cache=4.0 * rows * tokens * dit.dim)  # written to the ring
    block = _block(dit, size, tokens, seen) + kept
    heard = frames * (dit.audio_tokens + 1)
    local = attend(rows * tokens, dit.audio_tokens + 1, dit.dim, 0)
    injector = (
        linear(size, rows * tokens, dit.dim, dit.dim) * 2  # queries and output
        + linear(size, rows * heard, dit.dim, dit.dim) * 2  # keys and values
        + linear(size, rows * frames, dit.dim, 2 * dit.dim)
        + local
    )
    return ends + block * dit.layers + injector * len(dit.inject_layers)


def exchange(cfg: ModelConfig, size: Size, parts: int) -> float:
    """Bytes that a device sends in a forward whose tokens are parted: queries, keys and values
    change from tokens to heads, and attention's results back (all-to-all), in every layer."""
    tokens = size.rows * cfg.stream.block_frames * size.frame
    own = 2.0 * tokens * cfg.dit.dim / parts
    return 4 * own * (parts - 1) / parts * cfg.dit.layers


def reduced(cfg: ModelConfig, size: Size, tensor: int = 1, sequence: int = 1) -> float:
    """Bytes that a device of a stage sends in a tick, by the usual algorithms: results of rows of
    weights summed over `tensor` (in 16 bits, in 32 where weights have 8), tokens over `sequence`.
    """
    tokens = size.rows * cfg.stream.block_frames * size.frame / sequence
    width = 2.0 if size.weight_bytes == 2 else 4.0
    sums = 3 * cfg.dit.layers + len(cfg.dit.inject_layers)
    sent = sums * tokens * cfg.dit.dim * width * 2 * (tensor - 1) / tensor
    return sent + exchange(cfg, size, sequence) / tensor


def held(cfg: ModelConfig, size: Size, tensor: int = 1, sequence: int = 1) -> dict[str, float]:
    """Bytes that a device of a stage keeps between two ticks; caches have 16 bits."""
    once = forward(cfg, size).bytes_weights + text(cfg, size).bytes_weights
    token = 4.0 * size.rows * cfg.dit.dim * cfg.dit.layers / tensor
    seen = cfg.stream.ring_blocks * cfg.stream.block_frames * size.frame
    return {
        "weights": once / tensor,
        "ring": token * seen / sequence,
        "sink": token * size.sink(cfg.stream.motion) / sequence,
        "prompt": token * cfg.dit.text_len,
    }


def prefill(cfg: ModelConfig, size: Size) -> Cost:
    """The condition tokens through all layers: at a stream's start, and at a sink's refresh."""
    dit, tokens = cfg.dit, size.sink(cfg.stream.motion)
    patch = 4 * dit.latent_channels
    cost = linear(size, size.rows * size.frame, patch, dit.dim)
    for count, volume in zip(size.packed, (1, 8, 64), strict=True):
        if cfg.stream.motion:
            cost += linear(size, size.rows * count, patch * volume, dit.dim)
    written = Cost(bytes_cache=4.0 * size.rows * tokens * dit.dim)
    return cost + (_block(dit, size, tokens, tokens) + written) * dit.layers


def text(cfg: ModelConfig, size: Size) -> Cost:
    """Keys and values of the prompt for every layer, once a stream; without the text encoder."""
    dit, tokens = cfg.dit, size.rows * cfg.dit.text_len
    cost = linear(size, tokens, dit.text_dim, dit.dim) + linear(size, tokens, dit.dim, dit.dim)
    return cost + linear(size, tokens, dit.dim, dit.dim) * (2 * dit.layers)


def decode(cfg: ModelConfig, size: Size) -> Cost:
    """A block of latents to frames, after the first latent of a video."""
    return decode_latent(cfg.vae, size) * cfg.stream.block_frames


def decode_latent(vae: VAEConfig, size: Size) -> Cost:
    """One latent to four frames by the streaming decoder."""
    h, w, frames = size.height, size.width, size.rows
    widths = [vae.dim * m for m in reversed(vae.dim_mult)]
    c, z = widths[0] if vae.cells is None else vae.dim, vae.z_dim

    def conv(c: int, out: int, taps: int, read: float = 1.0) -> Cost:
        """`read` and written elements a position; 2-byte activations, weights as they are kept."""
        return linear(size, frames * h * w, taps * c, out, read / taps)

    def residual(c: int, out: int) -> Cost:
        cost = conv(c, out, 27) + conv(out, out, 27)
        return cost if c == out else cost + conv(c, out, 1)

    if vae.cells is not None:
        group = vae.frames_per_latent
        pixels = 3 * group * vae.pixels_per_latent**2
        own = linear(size, frames, z - MOTION, pixels) * (h * w)  # each place has a map of its own
        fine = frames * group * h * w * (vae.pixels_per_latent // 2) ** 2  # patches of 2 x 2 pixels
        conv2 = lambda c, out: linear(size, fine, 9 * c, out, 1 / 9)
        hints = conv(z, group * HINTS, 1) + conv2(24 + HINTS, c)
        return own + hints + conv2(c, c) * vae.cells + conv2(c, 12)
    attention = conv(c, 3 * c, 1) + conv(c, c, 1) + attend(frames * h * w, h * w, c, 0)
    cost = conv(z, z, 1) + conv(z, c, 27) + residual(c, c) * 2 + attention
    for level, out in enumerate(widths):
        for _ in range(vae.res_blocks + 1):
            cost += residual(c, out)
            c = out
        if level < len(widths) - 1:
            if vae.time_down[-1 - level]:
                cost += conv(c, 2 * c, 3)
                frames *= 2
            cost += conv(c, 4 * (c // 2), 4)  # at the small size: four corners of 2 x 2 taps
            h, w, c = 2 * h, 2 * w, c // 2
    return cost + conv(c, 3, 27)


def linear(size: Size, tokens: int, inputs: int, outputs: int, read: float = 1.0) -> Cost:
    """A map with bias of 16-bit activations; `read` is the share of inputs that are distinct."""
    return Cost(
        flops_matrix=2.0 * tokens * inputs * outputs,
        bytes_weights=float(size.weight_bytes * inputs * outputs + 2 * outputs),
        bytes_activations=2.0 * tokens * (read * inputs + outputs),
    )


def attend(queries: int, keys: int, dim: int, cached: int) -> Cost:
    """Scores and sums; of the keys and values, `cached` rows are read from a cache."""
    return Cost(
        flops_attention=4.0 * queries * keys * dim,
        bytes_cache=2.0 * 2 * cached * dim,
        bytes_activations=2.0 * 2 * queries * dim,
    )


def _block(dit: DiTConfig, size: Size, tokens: int, seen: int) -> Cost:
    rows, dim = size.rows, dit.dim
    square = linear(size, rows * tokens, dim, dim)
    return (
        square * 6  # query, key, value, output; query and output to the text
        + attend(rows * tokens, seen, dim, rows * seen)
        + attend(rows * tokens, dit.text_len, dim, rows * dit.text_len)
        + linear(size, rows * tokens, dim, dit.ffn_dim)
        + linear(size, rows * tokens, dit.ffn_dim, dim)
    )
