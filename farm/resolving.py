"""What names in a job stand for: checkpoints, adapters and the rest at one moment, and the recipe they resolve to."""

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar
from uuid import UUID

import orjson

from farm.errors import Problem
from farm.families import latents_of
from farm.recipe import AdapterUse, adapter_set_of, lane_of, normal, pipeline_key_of
from farm.tasks import Task, Use, in_order
from farm.views import AdapterView, CheckpointView, ControlNetView, MotionView, VaeView

T = TypeVar("T")

CONTENT_TOKENS = 75
"""CLIP reads 77 tokens, its start and end marks among them."""
ORIGIN = ("source", "revision", "file_sha256")
"""What a registered model knows of its origin, as far as pictures tell it on."""
OWN, TINY = "own", "tiny"
"""What a job may name as its VAE besides registered ones: the checkpoint's own, and the small fast one."""

TEACHER_STEPS = 25
TEACHER_GUIDANCE = 7.5


@dataclass(frozen=True, slots=True)
class Resolved:
    """What names stand for: the recipe without prompt and seed, and what follows from it."""

    body: dict[str, Any]
    lane: str
    adapter_set: str
    pipeline_key: str
    names_json: bytes
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Catalogue:
    """What jobs may name at one moment. `tokens` counts prompt tokens; it loads tokenizers when first asked.
    `owners` are the projects of those models that belong to one."""

    checkpoints: Mapping[str, CheckpointView]
    adapters: Mapping[str, AdapterView]
    vaes: Mapping[str, VaeView] = field(default_factory=dict)
    controlnets: Mapping[str, ControlNetView] = field(default_factory=dict)
    motions: Mapping[str, MotionView] = field(default_factory=dict)
    tokens: Callable[[str, str], int | None] = field(default=lambda _checkpoint, _prompt: None)
    owners: Mapping[str, UUID] = field(default_factory=dict)

    def of(self, project_id: UUID) -> "Catalogue":
        """What jobs of one project may name: what all share, and its own. Nothing else is resolved or hinted at."""
        hidden = {name for name, owner in self.owners.items() if owner != project_id}
        if not hidden:
            return self

        def seen(models: Mapping[str, T]) -> dict[str, T]:
            return {name: one for name, one in models.items() if name not in hidden}

        return replace(
            self,
            checkpoints=seen(self.checkpoints),
            adapters=seen(self.adapters),
            vaes=seen(self.vaes),
            controlnets=seen(self.controlnets),
            motions=seen(self.motions),
            owners={},
        )

    def too_long(self, checkpoint: str, prompt: str) -> bool:
        """Whether a prompt has more tokens than fit between CLIP's start and end marks."""
        # A token holds at least one byte, and CLIP's normalising leaves the length of ASCII alone: no need to count.
        if prompt.isascii() and len(prompt) <= CONTENT_TOKENS:
            return False
        return (self.tokens(checkpoint, prompt) or 0) > CONTENT_TOKENS

    def resolve(
        self,
        *,
        checkpoint: str,
        adapters: Sequence[tuple[str, float]],
        acceleration: str,
        width: int | None,
        height: int | None,
        steps: int | None,
        guidance_scale: float | None,
        scheduler: str | None,
        vae: str | None = None,
        task: Task = Task(),  # noqa: B008  # frozen
    ) -> Resolved | list[Problem]:
        """Names to hashes and defaults from the profile, or every problem found."""
        base = self.checkpoints.get(checkpoint)
        if base is None:
            return [{"field": "checkpoint", "problem": unknown("checkpoint", checkpoint, self.checkpoints)}]
        profile = base.profile
        problems: list[Problem] = []
        uses = self._uses(adapters, base, problems)
        accelerated = acceleration == "lcm-lora"
        motion = self._motion(task, base, problems)
        accelerator = self._accelerator(base, motion, problems) if accelerated else None
        controls = self._controls(task.controls, base, problems)
        decoder = self._vae(vae or profile.get("vae") or OWN, base, problems)
        if accelerated and scheduler not in (None, "lcm"):
            problem = f"acceleration lcm-lora needs scheduler lcm, not {scheduler}; or set acceleration to none"
            problems.append({"field": "scheduler", "problem": problem})
        size = _size(base, width, height, problems)
        teacher = {"steps": profile.get("teacher_steps", TEACHER_STEPS)}
        teacher["guidance_scale"] = profile.get("teacher_guidance_scale", TEACHER_GUIDANCE)
        defaults = profile if accelerated else teacher
        number = steps if steps is not None else int(defaults["steps"])
        body: dict[str, Any] = {
            "version": 1,
            **task.body(number, problems),
            **size,
            "steps": number,
            "guidance_scale": normal(guidance_scale if guidance_scale is not None else defaults["guidance_scale"]),
            "scheduler": scheduler or ("lcm" if accelerated else "ddim"),
            "checkpoint": base.hash,
            "adapters": uses,
        }
        if problems:
            return problems
        if controls:
            body["controls"] = controls
        further = {name: one for name, one in (("motion", motion), ("vae", decoder)) if one is not None}
        body |= {name: one.hash for name, one in further.items()}
        if accelerator is not None:
            body["acceleration"] = AdapterUse(hash=accelerator.hash, weight=1.0).model_dump()
        warnings = []
        if accelerated and body["steps"] > 8:
            warnings.append("LCM-LoRA tends to oversaturate beyond 8 steps")
        if accelerated and body["guidance_scale"] > 2.5:
            warnings.append("LCM-LoRA is made for guidance_scale 1.0 to 2.5")
        nets = [self.controlnets[name] for name in dict.fromkeys(use.name for use in task.controls)]
        named = [self.adapters[name] for name, _ in adapters]
        names: dict[str, Any] = {
            "checkpoint": base.name,
            "adapters": [{"name": name, "weight": normal(weight)} for name, weight in adapters],
            "acceleration": acceleration,
            **{name: one.name for name, one in further.items()},
            "models": _origins(base, decoder, accelerator, motion, *named, *nets),
        }
        if nets:
            names["controlnets"] = {net.hash: net.name for net in nets}
        return Resolved(
            body=body,
            lane=lane_of({**body, "controls": in_order(controls)} if controls else body),
            adapter_set=adapter_set_of(uses),
            pipeline_key=pipeline_key_of(body),
            names_json=orjson.dumps(names).replace(b"\\", b"\\\\"),
            warnings=tuple(warnings),
        )

    def _uses(
        self, adapters: Sequence[tuple[str, float]], base: CheckpointView, problems: list[Problem]
    ) -> list[dict[str, Any]]:
        uses: list[dict[str, Any]] = []
        for index, (name, weight) in enumerate(adapters):
            adapter = self.adapters.get(name)
            where = f"adapters.{index}.name"
            if adapter is None:
                problems.append({"field": where, "problem": unknown("adapter", name, self.adapters)})
            elif adapter.family != base.family:
                problem = f"{name} is made for {adapter.family}, but {base.name} is {base.family}"
                problems.append({"field": where, "problem": problem})
            elif adapter.kind == "acceleration":
                problem = f"{name} is an acceleration adapter; it is applied by acceleration: lcm-lora"
                problems.append({"field": where, "problem": problem})
            elif any(use["hash"] == adapter.hash for use in uses):
                problems.append({"field": where, "problem": f"{name} is named twice"})
            else:
                uses.append(AdapterUse(hash=adapter.hash, weight=weight).model_dump())
        return sorted(uses, key=lambda use: str(use["hash"]))

    def _controls(self, asked: Sequence[Use], base: CheckpointView, problems: list[Problem]) -> list[dict[str, Any]]:
        """Controls in the order they were asked for, without their images."""
        uses: list[dict[str, Any]] = []
        for index, use in enumerate(asked):
            net = self.controlnets.get(use.name)
            where = f"controls.{index}.name"
            if net is None:
                problems.append({"field": where, "problem": unknown("ControlNet", use.name, self.controlnets)})
            elif net.family != base.family:
                problem = f"{use.name} is made for {net.family}, but {base.name} is {base.family}"
                problems.append({"field": where, "problem": problem})
            else:
                shares = {"weight": normal(use.weight), "start": normal(use.start), "end": normal(use.end)}
                uses.append({"hash": net.hash, **shares})
        return uses

    def _motion(self, task: Task, base: CheckpointView, problems: list[Problem]) -> MotionView | None:
        if task.motion is None:
            return None
        found = self.motions.get(task.motion)
        if found is None:
            problems.append({"field": "motion", "problem": unknown("motion adapter", task.motion, self.motions)})
        elif found.family != base.family:
            problem = f"{found.name} is made for {found.family}, but {base.name} is {base.family}"
            problems.append({"field": "motion", "problem": problem})
        elif task.frames is not None and task.frames > found.max_frames:
            problem = f"{found.name} knows at most {found.max_frames} frames, not {task.frames}"
            problems.append({"field": "frames", "problem": problem})
        else:
            return found
        return None

    def _vae(self, name: str, base: CheckpointView, problems: list[Problem]) -> VaeView | None:
        latents = latents_of(base.family)
        if name == OWN:
            return None
        if name == TINY:
            fitting = [vae for vae in self.vaes.values() if vae.tiny and vae.family == latents]
            if fitting:
                return min(fitting, key=lambda vae: vae.created_at)
            problem = f"there is no tiny VAE for family {latents}: add one with farm models add"
        elif (found := self.vaes.get(name)) is None:
            problem = unknown("VAE", name, {**self.vaes, OWN: None, TINY: None})
        elif found.family != latents:
            problem = f"{name} decodes latents of {found.family}, but {base.name} makes those of {latents}"
        else:
            return found
        problems.append({"field": "vae", "problem": problem})
        return None

    def _accelerator(
        self, base: CheckpointView, motion: MotionView | None, problems: list[Problem]
    ) -> AdapterView | None:
        found = [a for a in self.adapters.values() if a.kind == "acceleration" and a.family == base.family]
        if not found:
            problem = f"there is no LCM-LoRA for family {base.family}: add one with farm models add, or send none"
            problems.append({"field": "acceleration", "problem": problem})
            return None
        named = base.profile.get("acceleration")
        if motion is not None and motion.acceleration is not None:
            named = motion.acceleration
            if all(a.name != named for a in found):
                problem = f"{motion.name} is drawn with {named}, which is no LCM-LoRA for family {base.family} here: "
                problems.append({"field": "acceleration", "problem": problem + "add it with farm models add"})
        return next((a for a in found if a.name == named), min(found, key=lambda a: a.created_at))


def _size(base: CheckpointView, width: int | None, height: int | None, problems: list[Problem]) -> dict[str, int]:
    profile = base.profile
    size = {"width": width or profile["width"], "height": height or profile["height"]}
    low, high, multiple = profile.get("min_size", 64), profile.get("max_size", 2048), profile.get("size_multiple", 8)
    for name, value in size.items():
        if not low <= value <= high or value % multiple:
            problem = f"{base.name} renders {low}..{high} pixels in steps of {multiple}, not {value}"
            problems.append({"field": name, "problem": problem})
    return size


def _origins(
    *models: CheckpointView | AdapterView | VaeView | ControlNetView | MotionView | None,
) -> list[dict[str, Any]]:
    """What a picture's metadata says of the registered models behind it: name, sha256, and where they came from.

    The model that comes with the package came from nowhere else; its sha256 stands in the recipe like everybody's.
    """
    return [
        {"name": model.name, "sha256": model.hash, **{key: model.source[key] for key in ORIGIN if key in model.source}}
        for model in models
        if model is not None and "source" in model.source
    ]


def unknown(kind: str, name: str, known: Mapping[str, Any] | Sequence[str]) -> str:
    """What to say of a name that nothing has: the nearest that something has, or all of them."""
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are: {', '.join(sorted(known)) or 'none'}"
    return f"there is no {kind} named {name}; {hint}"
