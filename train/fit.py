"""Train one network from one recipe: ``python -m train.fit RECIPE.toml OUTDIR``.

Read it from top to bottom; there is nothing else to a training run. The same command again
resumes from OUTDIR/checkpoint.pt, which is never a minute old. It uses the GPU if there is one;
for four: ``torchrun --nproc-per-node 4 -m train.fit RECIPE.toml OUTDIR``, where each draws a
batch of its own and follows the mean of their gradients.

Bias-free networks are homogeneous, f(a x) = a f(x). They train on counts divided by the dose,
with targets of 1 in vacuum, and take raw counts all the same; biased ones train on raw counts.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import time
import zlib
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from bench import report
from train import photographs
from train.command import alone_in, explained, writable_folder
from train.dataset import Images, range_of, specimens
from train.log import Log
from train.losses import LOSSES
from train.metrics import psnr_db
from train.models import BiasFreeBatchNorm, Network
from train.noise import PAPER_DOSE, Camera, draw_doses, expose
from train.recipe import Recipe, RecipeError, load_start, load_state, load_teacher, save

CHECKPOINT_S = 45.0
CALIBRATION_BATCHES = 40
EMA_DECAY = 0.999
LOG_EVERY = 100
VALIDATE_EVERY = 1000
CPU_VALIDATION_VIEWS = 16
WARM_UP_STEPS = (30, 300)
REMEDY = "take a recipe with a smaller learning_rate, and another OUTDIR"


class Diverged(RuntimeError):
    """The loss is no number any more."""


def choose_device() -> tuple[torch.device, torch.dtype]:
    """This process's device, and what its convolutions compute in."""
    if not torch.cuda.is_available():
        has = torch.cpu.get_capabilities()
        fast = has.get("avx512_bf16") or has.get("amx_bf16")
        return torch.device("cpu"), torch.bfloat16 if fast else torch.float32
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    torch.backends.cudnn.benchmark = True
    bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return device, torch.bfloat16 if bfloat16 else torch.float16


def hardware(device: torch.device, processes: int) -> str:
    """What the training ran on, in words."""
    if device.type == "cuda":
        return f"{processes} x {torch.cuda.get_device_name()}"
    return f"{torch.get_num_threads() * processes} cores of {torch.cpu.get_capabilities().get('cpu_name', 'a CPU')}"


def random(device: torch.device, *key: int) -> torch.Generator:
    """The random numbers of `key`. Every step has its own: to resume exactly, nothing of them need be saved."""
    return torch.Generator(device).manual_seed(zlib.crc32(repr(key).encode()))


def training_images(recipe: Recipe, device: torch.device) -> Any:
    """Something with ``random_views(count, size_px, generator)``, in the memory of `device`."""
    if recipe.task == "photographs":
        return photographs.Photographs(device=device)
    images = chosen_images(recipe.train, recipe)
    images.images = images.images.to(device)
    return images


def chosen_images(directory: str | None, recipe: Recipe) -> Images:
    """The images of a directory, or those of the recipe's group alone."""
    images = Images(Path(directory or ""))
    for key, group in (recipe.only or {}).items():
        try:
            images.keep(key, str(group))
        except ValueError as error:
            raise RecipeError(f"only = {recipe.only}, and in {directory} {error}") from None
    return images


def draw_batch(images: Any, recipe: Recipe, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Fresh views with fresh noise: counts (B, 1, S, S), truth (B, 1, S, S; 1 in vacuum), doses (B, 1, 1, 1)."""
    with generator.device:
        truth = images.random_views(recipe.batch, recipe.crop_px, generator)
        if recipe.task == "photographs":
            low, high = recipe.noise_sigma
            sigma = low + (high - low) * torch.rand(len(truth), 1, 1, 1, generator=generator)
            noisy = truth + sigma * torch.randn(truth.shape, generator=generator)
            return noisy / 255, truth / 255, torch.ones_like(sigma)
        doses = draw_doses(recipe.batch, generator)
        if recipe.doses == "paper":
            doses = torch.full_like(doses, PAPER_DOSE)
        camera = Camera(**recipe.camera or {})
        counts = camera.electrons(expose(truth, doses, generator, camera))
        return counts, truth.clamp_min(0), doses.view(-1, 1, 1, 1)


def predict(
    network: nn.Module, counts: Tensor, doses: Tensor, bias_free: bool, precision: torch.dtype
) -> Tensor:
    """What `network` makes of `counts`, in units of the dose: 1 in vacuum."""
    inputs = counts / doses if bias_free else counts
    with torch.autocast(counts.device.type, dtype=precision, enabled=precision is not torch.float32):
        estimate = network(inputs.to(memory_format=torch.channels_last)).float()
    return estimate if bias_free else estimate / doses


def validation_images(recipe: Recipe, images: Any) -> Images | None:
    """The images to validate on, other specimens than those of `images`; None for photographs."""
    if recipe.task == "photographs":
        return None
    chosen = chosen_images(recipe.validate, recipe)
    known = specimens(getattr(images, "parameters", ()))
    if both := sorted(known & specimens(getattr(chosen, "parameters", ()))):
        name, seed = both[0]
        raise RecipeError(
            f"train = {recipe.train} and validate = {recipe.validate} both show specimen {seed} of {name}: "
            "validate on others, made by train.simulate with another --first-seed"
        )
    return chosen


def held_out(
    images: Images | None, most: int | None = None, camera: Camera | None = None
) -> list[tuple[Tensor, Tensor]]:
    """Noisy and true views (N, 1, H, W) of `images`, `most` or fewer: 0.45 electrons per pixel. None: photographs.

    The noise is the same each time.
    """
    generator = torch.Generator().manual_seed(7)
    if images is None:
        return photographs.held_out(generator)
    views = images.central_views(512)[::2]
    views = views[:: -(-len(views) // (most or len(views)))]
    camera, pairs = camera or Camera(), []
    for true in views.split(4):
        noisy = expose(true, torch.full((len(true),), PAPER_DOSE), generator, camera)
        pairs.append((camera.electrons(noisy), PAPER_DOSE * true))
    return pairs


@torch.no_grad()
def validation_psnr(network: Network, pairs: list[tuple[Tensor, Tensor]], precision: torch.dtype) -> float:
    """Mean PSNR [dB] over `pairs` of noisy and true images."""
    device = next(network.parameters()).device
    scores = []
    for noisy, truth in pairs:
        with torch.autocast(device.type, dtype=precision, enabled=precision is not torch.float32):
            estimate = network(noisy.to(device))
        images = estimate.float().cpu().numpy()[:, 0], truth.numpy()[:, 0]
        scores += [psnr_db(*pair) for pair in zip(*images, strict=True)]
    return float(np.mean(scores))


@torch.no_grad()
def calibrate_norms(network: Network, images: Any, recipe: Recipe, precision: torch.dtype) -> None:
    """Set the statistics of every bias-free norm from data; training then keeps them fixed.

    Batch statistics would tie the scale of the output to whatever doses share a batch,
    and the network could not learn the scale at all. Fixed, each norm is a gain per
    channel, and the network trains exactly as it will run.
    """
    device = next(network.parameters()).device
    network.train()
    for n in range(CALIBRATION_BATCHES):
        counts, _, doses = draw_batch(images, recipe, random(device, recipe.seed, n))
        predict(network, counts, doses, True, precision)


def warm_up(step: int, expected: float) -> float:
    """The share of the learning rate in a step: it rises over a tenth of the `expected` steps, of 30 to 300."""
    least, most = WARM_UP_STEPS
    return min(1, (step + 1) / min(max(expected / 10, least), most))


def check_losses(losses: list[Tensor], rates: list[float], step: int) -> None:
    """Raise `Diverged` if one of the losses of the last steps before `step` is not finite."""
    finite = torch.stack(losses).isfinite().tolist() if losses else []
    if not all(finite):
        place = finite.index(False)
        raise Diverged(
            f"the loss is {losses[place].item()} in step {step - len(losses) + place + 1}, at a learning rate of "
            f"{rates[place]:.3g}: {REMEDY}"
        )


def provenance(images: Any, validation: Any) -> dict[str, Any]:
    """What trains, and what it trains and validates on: commit, date, how many images, of which specimens."""
    stamp = report.stamp("fit", ())
    found = {"commit": stamp["commit"], "date": stamp["date"], "images": len(images.images)}
    found |= range_of(specimens(getattr(images, "parameters", ())))
    return found | {"validated_on": range_of(specimens(getattr(validation, "parameters", ())))}


def clock_s(device: torch.device) -> float:
    """The time that counts [s]: on a CPU what its cores gave to this process, whatever else they had to do."""
    return time.monotonic() if device.type == "cuda" else time.process_time() / torch.get_num_threads()


def agree(seconds: float) -> float:
    """The clock of the first process is everyone's."""
    if not dist.is_initialized():
        return seconds
    clock = torch.tensor([seconds], dtype=torch.float64)
    dist.broadcast(clock, 0)
    return clock.item()


def fit(recipe: Recipe, out: Path) -> Network:
    """Train; leaves checkpoint.pt, best.pt and log.csv in `out` and returns this process's network.

    Raises `Diverged` when the loss stops being a number.
    """
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    first = rank == 0
    device, precision = choose_device()
    writable_folder(out)

    torch.manual_seed(recipe.seed)
    network = recipe.build()
    state = load_state(out, recipe, network)
    network.to(device, memory_format=torch.channels_last)
    teacher, taught_by = load_teacher(recipe) if recipe.distill_from else (None, {})
    images = training_images(recipe, device)
    validation = validation_images(recipe, images) if first else None
    few, camera = CPU_VALIDATION_VIEWS if device.type == "cpu" else None, Camera(**recipe.camera or {})
    pairs = held_out(validation, few, camera) if first else []
    made = provenance(images, validation)
    if recipe.start_from:
        # Read once: it may have moved since, or be another.
        made["began_from"] = state.get("training", {}).get("began_from") or load_start(recipe, network)
    if teacher is not None:
        teacher.to(device)
        made["taught_by"] = taught_by
    optimizer = torch.optim.AdamW(network.parameters(), lr=recipe.learning_rate, weight_decay=1e-4)
    scaler = torch.amp.GradScaler(device.type, enabled=precision is torch.float16)
    step, spent_s, best = state.get("step", 0), state.get("spent_s", 0.0), state.get("best", -math.inf)
    if step:
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state.get("scaler", {}))
    elif network.bias_free and not recipe.start_from:
        calibrate_norms(network, images, recipe, precision)
    ema = copy.deepcopy(network).eval()
    if step:
        ema.load_state_dict(state["ema"])
    network.train()
    for module in network.modules():
        if isinstance(module, BiasFreeBatchNorm):
            module.eval()

    trained: nn.Module = network
    if processes > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        trained = DistributedDataParallel(network)
    if recipe.compile:
        trained = torch.compile(trained)

    def part() -> float:
        return step / recipe.steps if recipe.steps else spent_s / (3600 * recipe.hours)

    def expected_steps() -> float:
        """Of the whole run, by the quickest step so far."""
        if recipe.steps:
            return recipe.steps
        return step + (3600 * recipe.hours - spent_s) / quickest_s if quickest_s else math.inf

    def checkpoint(validation_due: bool = False) -> None:
        save(
            out / "checkpoint.pt", recipe, network=network.state_dict(), ema=ema.state_dict(),
            optimizer=optimizer.state_dict(), scaler=scaler.state_dict(), step=step, spent_s=spent_s,
            validation_due=validation_due, hardware=hardware(device, processes), training=made,
        )  # fmt: skip

    def validate() -> float:
        """Score what is trained so far, and keep it if it is the best."""
        nonlocal best
        checkpoint(validation_due=True)
        score = validation_psnr(ema, pairs, precision)
        if not math.isfinite(score):
            raise Diverged(f"the network of step {step} validates with {score} dB: {REMEDY}")
        progress.write(f"step {step}: {score:.2f} dB")
        if score > best:
            best = score
            save(
                out / "best.pt", recipe, network=ema.state_dict(), step=step, spent_s=spent_s,
                validation_psnr_db=score, hardware=hardware(device, processes), training=made,
            )  # fmt: skip
        return score

    unvalidated = bool(state.get("validation_due")) or (part() >= 1 and best == -math.inf)
    log = Log(out, step - unvalidated) if first else None
    progress = tqdm(total=100, unit="%", disable=not first, bar_format="{l_bar}{bar}|{elapsed}{postfix}")
    if log is not None and unvalidated:
        log.write(step, round(spent_s), None, None, validate())
        checkpoint()
    if first and part() >= 1:
        asked = f"{recipe.steps} steps" if recipe.steps else f"{recipe.hours:g} hours"
        print(f"nothing is left to do: {out} has had {step} steps in {spent_s / 3600:.2f} hours of {asked}")
    begin, saved, quickest_s = clock_s(device) - spent_s, time.monotonic(), 0.0
    losses, rates, start = [], [], step
    if recipe.compile:
        progress.set_postfix_str("compiling, a minute or more; --no-compile starts at once")
    while part() < 1:
        # After the warm-up, half a cosine.
        rate = recipe.learning_rate * warm_up(step, expected_steps()) * 0.5 * (1 + math.cos(math.pi * part()))
        for group in optimizer.param_groups:
            group["lr"] = rate

        counts, truth, doses = draw_batch(images, recipe, random(device, recipe.seed, step, rank))
        estimate = predict(trained, counts, doses, network.bias_free, precision)
        loss = LOSSES[recipe.loss](estimate, truth, doses)
        if teacher is not None:
            with torch.no_grad():
                taught = predict(teacher, counts, doses, teacher.bias_free, precision).clamp_min(0)
            share = recipe.distill_weight
            loss = (1 - share) * loss + share * LOSSES[recipe.loss](estimate, taught, doses)
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        decay = min(EMA_DECAY, (step + 1) / (step + 10))
        with torch.no_grad():
            for kept, new in zip(ema.state_dict().values(), network.state_dict().values(), strict=True):
                if kept.is_floating_point():
                    kept.lerp_(new, 1 - decay)
        if first:
            losses.append(loss.detach())
            rates.append(rate)
        step += 1
        before_s, spent_s = spent_s, agree(clock_s(device) - begin)
        if step == start + 1 and recipe.compile:
            progress.set_postfix_str("")
        if step > start + 1:  # the first one compiles
            quickest_s = min(quickest_s or math.inf, spent_s - before_s)

        if not first:
            continue
        finished = part() >= 1
        progress.update(min(100, 100 * part()) - progress.n)
        validating = step % VALIDATE_EVERY == 0 or finished
        due = time.monotonic() - saved > CHECKPOINT_S
        if not (validating or due or step % LOG_EVERY == 0):
            continue
        check_losses(losses, rates, step)
        score = validate() if validating else None
        if validating or step % LOG_EVERY == 0:
            mean_loss = torch.stack(losses).mean().item()
            log.write(step, round(spent_s), f"{rate:.3g}", f"{mean_loss:.6f}", score)
            progress.set_postfix(step=step, loss=f"{mean_loss:.5f}")
            losses.clear()
            rates.clear()
        if validating or due:
            checkpoint()
            saved = time.monotonic()
    progress.close()
    if log is not None:
        log.close()
    if processes > 1:
        dist.barrier()  # the first is still validating
        dist.destroy_process_group()
    return network


@explained
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--hours", type=float, help="instead of the recipe's hours or steps")
    parser.add_argument("--steps", type=int, help="likewise")
    parser.add_argument("--no-compile", action="store_true", help="start at once; each step takes longer")
    arguments = parser.parse_args()
    recipe = Recipe.read(arguments.recipe)
    if (arguments.hours, arguments.steps) != (None, None):
        recipe = replace(recipe, hours=arguments.hours, steps=arguments.steps)
    if arguments.no_compile:
        recipe = replace(recipe, compile=False)
    first = int(os.environ.get("RANK", 0)) == 0
    with alone_in(arguments.out) if first else nullcontext():
        try:
            fit(recipe, arguments.out)
        except (ImportError, RuntimeError) as error:  # PyTorch trusts what lies in its cache, whole or not
            if ".so: file too short" not in str(error):
                raise
            raise ImportError(
                f"{error}: a run that was killed while it compiled left this file; delete it and run again, "
                "or give --no-compile"
            ) from None


if __name__ == "__main__":
    main()
