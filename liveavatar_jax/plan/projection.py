"""From costs to seconds, frames per second and the first frame.

A roofline is the time that a chip needs at the least: products at the peak of their dtype, every
byte once at full bandwidth meanwhile, and then whatever travels at the full rate of a link (of
what the devices of a stage exchange, little can overlap). Real programs need more. How much more
is stated, not hidden: `efficiency` is the share of its roofline that the paper's own stage reaches
on H800 (arXiv 2512.04677, table 3 and appendix E), and a projection for any chip assumes that it
reaches the same, which nobody has measured.
"""

import dataclasses

from liveavatar_jax.config import ModelConfig
from liveavatar_jax.plan.chips import CHIPS, Chip
from liveavatar_jax.plan.cost import Cost, Size, decode, forward, prefill, reduced
from liveavatar_jax.stream import LEAD_FRAMES

PUBLISHED_SIZE = (50, 90)  # latents of 720 x 400 pixels
PUBLISHED_SECONDS = {"bf16": 12 / 36.0, "fp8": 12 / 45.2}  # a stage on H800: 36.0 and 45.2 FPS
WEIGHT_BYTES = {"bf16": 2, "int8": 1, "fp8": 1}
VIDEO_FPS = 25  # of the released code


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds that each limit alone would take."""

    matrix: float
    memory: float
    link: float

    def at(self, efficiency: float) -> float:
        """With a share of the peaks; links are taken to reach theirs."""
        return max(self.matrix, self.memory) / efficiency + self.link

    @property
    def seconds(self) -> float:
        return self.at(1.0)

    @property
    def limit(self) -> str:
        return max(("matrix", "memory", "link"), key=lambda name: getattr(self, name))


def roofline(cost: Cost, chip: Chip, weights: str = "bf16", sent: float = 0.0) -> Roofline:
    """Of one device; `weights` names the dtype of products with weights, `sent` bytes a link.

    Attention stays in 16 bits, as published.
    """
    matrix = cost.flops_matrix / chip.rate(weights) + cost.flops_attention / chip.rate("bf16")
    return Roofline(matrix=matrix, memory=cost.bytes / chip.bandwidth, link=sent / chip.link)


def efficiency(weights: str = "bf16") -> float:
    """Share of its roofline that the paper's stage reaches on H800, by the dtype of its weights."""
    published = "bf16" if weights == "bf16" else "fp8"  # int8 runs at the same peak as fp8
    size = Size(*PUBLISHED_SIZE, weight_bytes=WEIGHT_BYTES[published])
    ideal = roofline(forward(ModelConfig(), size), CHIPS["h800"], published)
    return ideal.seconds / PUBLISHED_SECONDS[published]


@dataclasses.dataclass(frozen=True)
class Projection:
    """Of one number of steps and sessions. Seconds; frames per second of every session."""

    steps: int
    sessions: int
    stage: Roofline
    decoder: Roofline
    refresh: Roofline  # what a tick takes longer when the sink is made anew
    opening: Roofline | None  # a step of the first block, on all stages; None: heads do not part
    efficiency: float
    shared: bool  # the decoder runs on the stages' devices, after their tick
    frames: int  # of a block
    sink_after: int | None

    def tick(self, efficiency: float) -> float:
        """Between two blocks of a filled pipeline."""
        stage, decoder = self.stage.at(efficiency), self.decoder.at(efficiency)
        return stage + decoder if self.shared else max(stage, decoder)

    def fps(self, efficiency: float) -> float:
        return self.frames / self.tick(efficiency)

    def first_frame(self, efficiency: float) -> float:
        """The first block through all steps, and decoded; without the wait for audio."""
        return self.steps * self.stage.at(efficiency) + self.decoder.at(efficiency)

    def first_frame_warm(self, efficiency: float) -> float | None:
        """The same where all stages work on the first block together, step by step."""
        if self.opening is None:
            return None
        return self.steps * self.opening.at(efficiency) + self.decoder.at(efficiency)

    def warm_blocks(self, efficiency: float) -> int | None:
        """How many blocks all stages have to make together so that playback does not wait at the
        hand-over or later, for the pipeline fills while they play; None if none are enough."""
        if self.fps(efficiency) < VIDEO_FPS or self.opening is None:
            return None
        return next((n for n in range(1, 101) if self._unbroken(n, efficiency)), None)

    def _unbroken(self, warm: int, efficiency: float) -> bool:
        """Whether from the hand-over on each block is there when the one before it was shown."""
        assert self.opening is not None
        opening, tick = self.steps * self.opening.at(efficiency), self.tick(efficiency)
        opening += self.shared * self.decoder.at(efficiency)
        refresh, due = self.refresh.at(efficiency), self.sink_after
        if due is None:
            refresh = due = 0
        ready = [(k + 1) * opening + (k >= due) * refresh / self.steps for k in range(warm)]
        now = ready[-1]
        for k in range(warm, max(warm, due) + 3 * self.steps):  # ticks, by the block that enters
            now += tick + (warm <= due <= k < due + self.steps) * refresh
            ready.append(now)
        del ready[warm : warm + self.steps - 1]  # nothing leaves while the pipeline fills
        shown = ready[0]  # until then all blocks before this one are
        for k, at in enumerate(ready):
            if k >= warm and at > shown:
                return False
            shown = max(shown, at) + (self.frames - LEAD_FRAMES * (k == 0)) / VIDEO_FPS
        return True

    @property
    def real_time(self) -> bool:
        return self.fps(self.efficiency) >= VIDEO_FPS


def project(
    cfg: ModelConfig,
    size: Size,
    chip: Chip,
    *,
    steps: int,
    weights: str = "bf16",
    tensor: int = 1,
    sequence: int = 1,
    sent: float = 0.0,
    opening: float | None = None,
    decoders: int = 1,
) -> Projection:
    """A pipeline of `steps` stages of tensor x sequence devices, and `decoders` for the VAE.

    `sent` are bytes a device sends a tick, `opening` those of one step of a block that all stages
    make together (default: counted); no decoders of its own (0): the VAE shares the stages'.
    """
    size = dataclasses.replace(size, weight_bytes=WEIGHT_BYTES[weights])
    stage, parts = forward(cfg, size).split(tensor, sequence), steps * sequence
    alone = dataclasses.replace(size, rows=1)  # streams open, and renew their sink, one by one
    pixels = dataclasses.replace(size, weight_bytes=4)  # the VAE's weights are float32
    beside = sharing(decoders, min(steps * tensor * sequence, chip.host), size.width)
    together = None
    if cfg.dit.heads % (parts * tensor) == 0:
        sent_once = reduced(cfg, alone, tensor, parts) if opening is None else opening
        together = roofline(forward(cfg, alone).split(tensor, parts), chip, weights, sent_once)
    return Projection(
        steps=steps,
        sessions=size.rows,
        stage=roofline(stage, chip, weights, sent),
        refresh=roofline(prefill(cfg, alone).split(tensor, sequence), chip, weights),
        opening=together,
        decoder=roofline(decode(cfg, pixels).split(sequence=beside), chip),
        efficiency=efficiency(weights if weights in chip.peak else "bf16"),
        shared=not decoders,
        frames=4 * cfg.stream.block_frames,
        sink_after=cfg.stream.sink_after,
    )


def sharing(decoders: int, devices: int, width: int) -> int:
    """Devices that decode: `decoders` of their own, or as many of a host as divide the columns."""
    return decoders or max(n for n in range(1, devices + 1) if width % n == 0)
