"""What a training run is told, and the files it leaves: every mistake in either is explained.

The comments in train/recipes/ say how each value was chosen.
"""

from __future__ import annotations

import tomllib
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

import torch

from emstream.errors import EngineInvalid
from emstream.inference.torch import read_program
from train.models import Network, build
from train.models.folding import load_folded
from train.noise import Camera

CHOICES = {
    "task": ("tem", "photographs"),
    "loss": ("mse", "poisson", "anscombe"),
    "doses": ("range", "paper"),
}


NETWORK = ("network", "base", "scales", "unshuffle", "bias")
CHANGEABLE = ("hours", "steps", "compile", "distill_weight")  # from one call of train.fit to the next
LARGEST_SEED = 2**63 - 1


class RecipeError(ValueError):
    """A recipe, or a checkpoint that it meets, does not fit."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One training run."""

    network: str
    base: int | None = None
    scales: int | None = None
    unshuffle: int | None = None
    bias: bool | None = None
    """Arguments of the network; None leaves its own default."""
    task: str = "tem"
    train: str | None = None
    validate: str | None = None
    """Directories made by train.simulate; photographs come with the packages in train/photographs.py."""
    only: dict | None = None
    """Train on the images of one group, as train.evaluate groups them: { shape = "PtNp1" }."""
    doses: str = "range"
    """As train.noise draws them, or the paper's 0.45 electrons per pixel alone."""
    camera: dict | None = None
    """What the camera adds to shot noise, by the fields of train.noise.Camera: { mtf_nyquist = 0.5 }. The network is
    given electrons all the same: offset and gain are taken off again."""
    noise_sigma: list | None = None
    """Photographs: lowest and highest standard deviation of the noise [grey levels of 255]."""
    hours: float | None = None
    steps: int | None = None
    """One of the two. By the clock (a CPU's: what it gave to this process), a slower machine does fewer steps; by
    steps, the run repeats exactly."""
    batch: int
    """Views per step and process."""
    crop_px: int
    learning_rate: float
    """Peak of the cosine."""
    loss: str = "mse"
    """See train/losses.py."""
    start_from: str | None = None
    """A best.pt or an engine's .pt2 of the same network, to go on from its weights: for another material, or better
    images."""
    distill_from: str | None = None
    """A best.pt whose network's estimates are targets beside the truth ..."""
    distill_weight: float = 0.5
    """... with this share of the loss."""
    compile: bool = True
    """A minute at the start, and faster steps."""
    seed: int = 1

    def __post_init__(self) -> None:
        for key, kind in get_type_hints(Recipe).items():
            value, kinds = getattr(self, key), getattr(kind, "__args__", (kind,))
            if type(value) not in kinds and not (type(value) is int and float in kinds):
                wanted = " or ".join(k.__name__ for k in kinds if k is not type(None))
                raise RecipeError(f"{key} must be {wanted}, got {value!r}")
            if type(value) in (int, float) and key != "seed" and not value > 0:
                raise RecipeError(f"{key} must be positive, got {value}")
        if abs(self.seed) > LARGEST_SEED:
            raise RecipeError(f"seed must lie within +-{LARGEST_SEED}, got {self.seed}")
        for key, choices in CHOICES.items():
            if getattr(self, key) not in choices:
                raise RecipeError(f"{key} must be one of {', '.join(choices)}, got {getattr(self, key)!r}")
        if (self.hours is None) == (self.steps is None):
            raise RecipeError(f"give either hours or steps, got hours {self.hours} and steps {self.steps}")
        if self.distill_weight > 1:
            raise RecipeError(f"distill_weight must be at most 1, got {self.distill_weight}")
        if self.task == "photographs":
            sigmas = self.noise_sigma or []
            if (
                len(sigmas) != 2
                or not {type(s) for s in sigmas} <= {int, float}
                or not 0 <= sigmas[0] < sigmas[1]
            ):
                raise RecipeError(f"photographs need noise_sigma = [lowest, highest], got {self.noise_sigma}")
            given = self.loss, self.doses, self.train, self.validate, self.only, self.camera
            if given != ("mse", "range", *[None] * 4):
                raise RecipeError(
                    "photographs have no doses, no train, validate, only or camera, and the loss mse"
                )
        else:
            if missing := [key for key in ("train", "validate") if getattr(self, key) is None]:
                raise RecipeError(f"missing key {', '.join(missing)}")
            if self.only is not None and len(self.only) != 1:
                raise RecipeError(f'only takes one group, like {{ shape = "PtNp1" }}, got {self.only}')
            known = [field.name for field in fields(Camera)]
            if unknown := sorted(set(self.camera or {}) - set(known)):
                raise RecipeError(f"camera has no {', '.join(unknown)}; it takes {', '.join(known)}")
            try:
                Camera(**self.camera or {})
            except (TypeError, ValueError) as error:
                raise RecipeError(f"camera = {self.camera}: {error}") from None
            if self.noise_sigma is not None:
                raise RecipeError("noise_sigma is for photographs; TEM frames have Poisson noise")

    @classmethod
    def of(cls, values: dict[str, Any], where: Path) -> Recipe:
        """The recipe of the keys and values found at `where`."""
        known = {field.name: field for field in fields(cls)}
        if unknown := sorted(set(values) - set(known)):
            raise RecipeError(f"{where}: unknown key {', '.join(unknown)}; known: {', '.join(known)}")
        required = {name for name, field in known.items() if field.default is MISSING}
        if missing := sorted(required - set(values)):
            raise RecipeError(f"{where}: missing key {', '.join(missing)}")
        try:
            recipe = cls(**values)
            multiple_px = recipe.outline().multiple_px
        except ValueError as error:
            raise RecipeError(f"{where}: {error}") from None
        if recipe.crop_px % multiple_px:
            raise RecipeError(f"{where}: crop_px must be a multiple of {multiple_px}, got {recipe.crop_px}")
        return recipe

    @classmethod
    def read(cls, path: Path) -> Recipe:
        try:
            values = tomllib.loads(path.read_text())
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise RecipeError(f"{path}: {error}") from None
        return cls.of(values, path)

    def build(self) -> Network:
        """The network, untrained."""
        arguments = {key: getattr(self, key) for key in NETWORK[1:]}
        return build(self.network, **{key: value for key, value in arguments.items() if value is not None})

    def outline(self) -> Network:
        """The network without any weights."""
        with torch.device("meta"):
            return self.build()


def save(path: Path, recipe: Recipe, **state: Any) -> None:
    """Write a checkpoint so that `path` is always whole, also when killed."""
    partial = path.with_suffix(".partial")
    torch.save({"recipe": asdict(recipe), **state}, partial)
    partial.replace(path)


def load(path: Path) -> tuple[Recipe, Network, dict[str, Any]]:
    """The recipe, the network and everything else of a checkpoint: checkpoint.pt or best.pt."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of any kind: what torch makes of rubbish depends on the rubbish
        raise RecipeError(f"{path} is no checkpoint of train.fit: {error}") from None
    try:
        recipe = Recipe.of(state["recipe"], path)
        network = recipe.outline()
        # A plain dictionary: torch notes in its own kind that it is assigned, and would do so ever after.
        network.load_state_dict(dict(state["network"]), assign=True)
    except (RuntimeError, KeyError, TypeError) as error:
        raise RecipeError(f"{path} is no checkpoint of train.fit: {error}") from None
    return recipe, network, state


def load_state(out: Path, recipe: Recipe, network: Network) -> dict[str, Any]:
    """Where the run in `out` of this very recipe stopped, and its best validation so far; {} at the start."""
    states = {}
    for name in ("checkpoint.pt", "best.pt"):
        if (out / name).exists():
            theirs, saved, states[name] = load(out / name)
            if (theirs.task, repr(saved)) != (recipe.task, repr(network)):
                raise RecipeError(
                    f"{out / name} holds another network than the recipe asks for ({theirs.task}: "
                    f"{saved.description}, {'bias-free' if saved.bias_free else 'biased'}); choose another OUTDIR"
                )
            was, now = asdict(theirs), asdict(recipe)
            changed = [key for key in was if key not in (*NETWORK, *CHANGEABLE) and was[key] != now[key]]
            if changed:
                changes = ", ".join(f"{key} was {was[key]!r} and is now {now[key]!r}" for key in changed)
                raise RecipeError(f"{out / name} is of another recipe: {changes}; choose another OUTDIR")
    best = {"best": states["best.pt"]["validation_psnr_db"]} if "best.pt" in states else {}
    return states.get("checkpoint.pt", {}) | best


def load_start(recipe: Recipe, network: Network) -> dict[str, Any]:
    """Give `network` the weights of the recipe's ``start_from``; returns how those came to be."""
    path = Path(recipe.start_from or "")
    if path.suffix == ".pt2":
        return _load_engine_start(path, recipe, network)
    theirs, saved, state = load(path)
    if (theirs.task, repr(saved)) != (recipe.task, repr(network)):
        raise _another_network(path, theirs.task, saved.description, saved.bias_free)
    network.load_state_dict(saved.state_dict())
    return {"steps": state["step"], "spent_s": state["spent_s"], **state.get("training", {})}


def _load_engine_start(path: Path, recipe: Recipe, network: Network) -> dict[str, Any]:
    try:
        program, card = read_program(path)
    except EngineInvalid as error:
        raise RecipeError(f"start_from = {path} is no engine of train.export: {error}") from None
    if (recipe.task, card.architecture, card.bias_free) != ("tem", network.description, network.bias_free):
        raise _another_network(path, "tem", card.architecture, card.bias_free)
    load_folded(network, program.state_dict)
    return {"engine": card.name, "trained": card.trained, **(card.training or {})}


def _another_network(path: Path, task: str, description: str, bias_free: bool) -> RecipeError:
    return RecipeError(
        f"start_from = {path}, which holds another network than the recipe asks for ({task}: "
        f"{description}, {'bias-free' if bias_free else 'biased'})"
    )


def load_teacher(recipe: Recipe) -> tuple[Network, dict[str, Any]]:
    """The network to learn from beside the truth, and how it came to be."""
    theirs, teacher, state = load(Path(recipe.distill_from or ""))
    if theirs.task != recipe.task or recipe.crop_px % teacher.multiple_px:
        raise RecipeError(
            f"{recipe.distill_from} cannot teach here: it is for {theirs.task} in multiples of "
            f"{teacher.multiple_px} px, the recipe for {recipe.task} in crops of {recipe.crop_px} px"
        )
    return teacher.eval().requires_grad_(False), state.get("training", {})
