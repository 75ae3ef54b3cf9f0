"""Train one network from one recipe: ``python -m train.fit RECIPE.toml OUTDIR``.

Read it from top to bottom; there is nothing else to a training run. Run the same
command again to resume from OUTDIR/checkpoint.pt (written every minute).

Inputs are divided by their dose and targets are 1 in vacuum. The networks are
homogeneous, f(a x) = a f(x), so the trained network takes raw counts all the same.
"""

from __future__ import annotations

import argparse
import copy
import csv
import math
import time
import tomllib
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from train.dataset import Images
from train.models.unet import BiasFreeBatchNorm, UNet
from train.noise import PAPER_DOSE, draw_doses, expose

CHECKPOINT_S = 60.0
CALIBRATION_BATCHES = 40
EMA_DECAY = 0.999
LOG_EVERY = 100
VALIDATE_EVERY = 1000


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One training run; train/recipes/unet32-cpu.toml says how to choose each value."""

    network: str
    base: int
    scales: int
    unshuffle: int
    train: str
    validate: str
    hours: float
    batch: int
    crop_px: int
    learning_rate: float
    seed: int

    @classmethod
    def read(cls, path: Path) -> Recipe:
        values = tomllib.loads(path.read_text())
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"{path}: unknown key {', '.join(unknown)}; known: {', '.join(sorted(known))}")
        if missing := sorted(known - set(values)):
            raise ValueError(f"{path}: missing key {', '.join(missing)}")
        return cls(**values)

    def build(self) -> UNet:
        """The network, untrained."""
        if self.network != "UNet":
            raise ValueError(f"network must be UNet, got {self.network!r}")
        return UNet(self.base, self.scales, self.unshuffle)

    def same_network(self, other: dict[str, object]) -> bool:
        """Whether weights of the recipe `other` fit this one's network."""
        return all(other.get(key) == getattr(self, key) for key in ("network", "base", "scales", "unshuffle"))


def psnr(estimate: Tensor, truth: Tensor) -> Tensor:
    """PSNR [dB] of each image (N, 1, H, W) in electrons per pixel, peak 1 electron, clipped to [0, 1]."""
    error = estimate.clamp(0, 1) - truth.clamp(0, 1)
    return -10 * torch.log10(error.square().mean(dim=(1, 2, 3)))


@torch.no_grad()
def validation_psnr(network: nn.Module, views: Tensor) -> float:
    """Mean PSNR [dB] over `views` (N, 1, H, W) at 0.45 electrons per pixel; the noise is the same each time."""
    generator = torch.Generator().manual_seed(7)
    scores = []
    for view in views.split(4):
        counts = expose(view, torch.full((len(view),), PAPER_DOSE), generator)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            estimate = network(counts)
        scores.append(psnr(estimate.float(), PAPER_DOSE * view))
    return torch.cat(scores).mean().item()


@torch.no_grad()
def calibrate_norms(network: nn.Module, images: Images, recipe: Recipe, generator: torch.Generator) -> None:
    """Set every batch norm's statistics from data; training then keeps them fixed.

    Batch statistics would tie the scale of the output to whatever doses share a batch,
    and the network could not learn the scale at all. Fixed, each norm is a gain per
    channel, and the network trains exactly as it will run.
    """
    network.train()
    for _ in range(CALIBRATION_BATCHES):
        inputs, _, _ = draw_batch(images, recipe, generator)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            network(inputs)


def draw_batch(images: Images, recipe: Recipe, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Fresh views with fresh noise: inputs and targets (B, 1, S, S) in units of the dose, doses (B,)."""
    truth = images.random_views(recipe.batch, recipe.crop_px, generator)
    doses = draw_doses(recipe.batch, generator)
    inputs = expose(truth, doses, generator) / doses.view(-1, 1, 1, 1)
    return inputs.to(memory_format=torch.channels_last), truth, doses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--hours", type=float, help="instead of the recipe's")
    parser.add_argument("--no-compile", action="store_true", help="start at once; each step takes longer")
    arguments = parser.parse_args()
    recipe = Recipe.read(arguments.recipe)
    budget_s = 3600 * (arguments.hours or recipe.hours)
    arguments.out.mkdir(parents=True, exist_ok=True)
    checkpoint_path = arguments.out / "checkpoint.pt"

    torch.manual_seed(recipe.seed)
    network = recipe.build().to(memory_format=torch.channels_last)
    ema = copy.deepcopy(network).eval()
    optimizer = torch.optim.AdamW(network.parameters(), lr=recipe.learning_rate, weight_decay=1e-4)
    generator = torch.Generator().manual_seed(recipe.seed)
    step, spent_s, best = 0, 0.0, -math.inf
    if checkpoint_path.exists():
        state = torch.load(checkpoint_path, weights_only=True)
        if not recipe.same_network(state["recipe"]):
            raise ValueError(
                f"{checkpoint_path} holds another network than {arguments.recipe} asks for: "
                f"{state['recipe']}; choose another OUTDIR"
            )
        network.load_state_dict(state["network"])
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"])
        step, spent_s, best = state["step"], state["spent_s"], state["best"]

    images = Images(Path(recipe.train))
    held_out = Images(Path(recipe.validate)).central_views(512)[::2]
    if step == 0:
        calibrate_norms(network, images, recipe, generator)
        ema.load_state_dict(network.state_dict())
    network.train()
    for module in network.modules():
        if isinstance(module, BiasFreeBatchNorm):
            module.eval()
    compiled = network if arguments.no_compile else torch.compile(network)

    log_path = arguments.out / "log.csv"
    new_log = not log_path.exists()
    progress = tqdm(total=round(budget_s), initial=round(spent_s), unit="s")
    begin, saved, losses = time.monotonic() - spent_s, time.monotonic(), []
    with log_path.open("a", newline="") as log_file:
        log = csv.writer(log_file)
        if new_log:
            log.writerow(["step", "seconds", "learning_rate", "loss", "validation_psnr_db"])
        while spent_s < budget_s:
            part = spent_s / budget_s
            rate = recipe.learning_rate * min(1, (step + 1) / 300) * 0.5 * (1 + math.cos(math.pi * part))
            for group in optimizer.param_groups:
                group["lr"] = rate

            inputs, truth, doses = draw_batch(images, recipe, generator)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                estimate = compiled(inputs)
            # At low dose no network can be right: weigh errors by about what is attainable.
            weight = (doses / PAPER_DOSE).pow(0.7)
            loss = (weight.view(-1, 1, 1, 1) * (estimate.float() - truth).square()).mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            decay = min(EMA_DECAY, (step + 1) / (step + 10))
            with torch.no_grad():
                for kept, new in zip(ema.state_dict().values(), network.state_dict().values(), strict=True):
                    if kept.is_floating_point():
                        kept.lerp_(new, 1 - decay)
            losses.append(loss.detach())
            step += 1
            spent_s = time.monotonic() - begin
            progress.update(round(spent_s) - progress.n)

            finished = spent_s >= budget_s
            if step % LOG_EVERY == 0 or finished:
                score = validation_psnr(ema, held_out) if step % VALIDATE_EVERY == 0 or finished else None
                mean_loss = torch.stack(losses).mean().item()
                losses.clear()
                log.writerow([step, round(spent_s), f"{rate:.3g}", f"{mean_loss:.6f}", score])
                log_file.flush()
                progress.set_postfix(step=step, loss=f"{mean_loss:.5f}")
                if score is not None:
                    progress.write(f"step {step}: {score:.2f} dB at {PAPER_DOSE} electrons/pixel")
                    if score > best:
                        best = score
                        save(
                            arguments.out / "best.pt",
                            {
                                "recipe": asdict(recipe),
                                "network": ema.state_dict(),
                                "step": step,
                                "spent_s": spent_s,
                                "validation_psnr_db": score,
                            },
                        )
            if time.monotonic() - saved > CHECKPOINT_S or finished:
                save(
                    checkpoint_path,
                    {
                        "recipe": asdict(recipe),
                        "network": network.state_dict(),
                        "ema": ema.state_dict(),
                        "optimizer": optimizer.state_dict(),
                        "best": best,
                        "generator": generator.get_state(),
                        "step": step,
                        "spent_s": spent_s,
                    },
                )
                saved = time.monotonic()
    progress.close()


def save(path: Path, state: dict[str, object]) -> None:
    """Write `state` so that `path` is always whole, also when killed."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


if __name__ == "__main__":
    main()
