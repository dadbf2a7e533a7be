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
from liveavatar_jax.plan.cost import Cost, Size, decode, exchange, forward, prefill

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
    opening: Roofline  # one step of the first block, its tokens parted over all stages
    efficiency: float
    shared: bool  # the decoder runs on the stages' devices, after their tick
    frames: int  # of a block

    def tick(self, efficiency: float) -> float:
        """Between two blocks of a filled pipeline."""
        stage, decoder = self.stage.at(efficiency), self.decoder.at(efficiency)
        return stage + decoder if self.shared else max(stage, decoder)

    def fps(self, efficiency: float) -> float:
        return self.frames / self.tick(efficiency)

    def first_frame(self, efficiency: float) -> float:
        """The first block through all steps, and decoded; without the wait for audio."""
        return self.steps * self.stage.at(efficiency) + self.decoder.at(efficiency)

    def first_frame_warm(self, efficiency: float) -> float:
        """The same where all stages work on the first block together, step by step."""
        return self.steps * self.opening.at(efficiency) + self.decoder.at(efficiency)

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
    decoders: int = 1,
) -> Projection:
    """A pipeline of `steps` stages of tensor x sequence devices, and `decoders` for the VAE.

    `sent` are bytes a device sends a tick, from the compiled program; no decoders of its own
    (0): the VAE shares the stages' devices.
    """
    size = dataclasses.replace(size, weight_bytes=WEIGHT_BYTES[weights])
    tick = forward(cfg, size)
    stage, parts = tick.split(tensor, sequence), steps * sequence
    pixels = dataclasses.replace(size, weight_bytes=4)  # the VAE's weights are float32
    devices = decoders or steps * tensor * sequence
    return Projection(
        steps=steps,
        sessions=size.rows,
        stage=roofline(stage, chip, weights, sent),
        refresh=roofline(prefill(cfg, size).split(tensor, sequence), chip, weights),
        opening=roofline(
            tick.split(tensor, parts), chip, weights, exchange(cfg, size, parts) / tensor + sent
        ),
        decoder=roofline(decode(cfg, pixels).split(sequence=devices), chip),
        efficiency=efficiency(weights if weights in chip.peak else "bf16"),
        shared=not decoders,
        frames=4 * cfg.stream.block_frames,
    )
