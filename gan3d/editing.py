"""Edits of scenes that a compositional generator draws: films of what becomes of them, tables of exchanged codes.

Such a generator has `scene(ws) -> Scene`, draws a Scene in the place of ws, and tells by `layout` how its training
scenes are arranged (GIRAFFE). A Scene is a frozen dataclass of tensors: shape, appearance, scale, translation, rotation
and presence of n objects, `[b n …]`, and background_shape, background_appearance and background_rotation; z is up,
rotations are radians about it. Here every Scene is a single one (b = 1).

An edit takes a scene and a phase in [0, 1), and is the scene itself at phase 0: its film is a closed loop.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor
from torch.nn import functional as F

from gan3d import pictures, views
from gan3d.cameras import Camera, Number
from gan3d.rays import Bounds

Scene = Any  # of a method
OF_OBJECTS = ("shape", "appearance", "scale", "translation", "rotation", "presence")
OF_BACKGROUND = ("background_shape", "background_appearance", "background_rotation")
CANDIDATES = 64  # places tried before looking further away
SIZES = [0.85**step for step in range(10)]  # of all objects, tried until there is room for those that are added


@dataclasses.dataclass(frozen=True)
class Stage:
    """What the edits of one call share.

    Args:
        ws_of: seeds → ws; a seed is always the same scene.
        seeds: of the scenes; films show the first `side_by_side` of them. sources: of those that swaps take from.
        frames: of a film.
        object: number of the object that is edited. objects: how many there are after adding; None: three more.
        factor: how many times as large, and as small, an object is scaled.
    """

    generator: Any
    ws_of: Callable[[Sequence[int]], Tensor]
    seeds: Sequence[int]
    camera: Camera
    resolution: int
    frames: int
    side_by_side: int
    sources: Sequence[int]
    object: int
    objects: int | None
    factor: Number

    def scenes(self, seeds: Sequence[int], edited: bool) -> list[Scene]:
        """Each without the places of objects that are not there. Raises: ValueError if `edited` and one lacks the
        object that is asked for."""
        with views.looking(self.generator) as device:
            made = [self.generator.scene(w[None].to(device)) for w in self.ws_of(seeds)]
        made = [select(scene, torch.nonzero(scene.presence[0] > 0)[:, 0]) for scene in made]
        for seed, scene in zip(seeds, made, strict=True):
            there = scene.presence.shape[1]
            if edited and not 0 <= self.object < there:
                raise ValueError(f"object={self.object}: the scene of seed {seed} has {there}, numbered from 0")
        return made

    def film(self, what: str) -> Iterator[UInt8[Tensor, "h w 3"]]:
        """rotate, move, scale, add or remove: frames of scenes side by side, before one camera."""
        seeds, layout = self.seeds[: self.side_by_side], self.generator.layout
        scenes = self.scenes(seeds, edited=what in ("rotate", "move", "scale"))
        edits: dict[str, Callable[[Scene, float], Scene]] = {
            "rotate": partial(rotate, object=self.object, layout=layout),
            "move": partial(move, object=self.object, layout=layout),
            "scale": partial(grow, object=self.object, factor=self.factor),
            "add": appear, "remove": vanish}
        if what == "add":
            scenes = [self.crowded(scene, seed) for scene, seed in zip(scenes, seeds, strict=True)]
        for frame in range(self.frames):
            yield pictures.grid(self.draw([edits[what](scene, frame / self.frames) for scene in scenes]), len(scenes))

    def crowded(self, scene: Scene, seed: int) -> Scene:
        """With the first objects of the seeds 1000, 2000, … further on, which are not present yet. Where they do not
        fit into what the camera sees, all objects are made smaller (where one object fills the picture)."""
        there = scene.presence.shape[1]
        wanted = there + 3 if self.objects is None else self.objects
        if wanted <= there:
            raise ValueError(f"objects={wanted}: the scene of seed {seed} has {there} already")
        further = self.scenes([seed + 1000 * more for more in range(1, wanted - there + 1)], edited=False)
        sees = partial(in_sight, self.camera, self.generator.bounds)
        for size in SIZES:
            first = [resized(select(donor, slice(0, 1)), size) for donor in further]
            whole = crowd(resized(scene, size), first, self.generator.layout, seed, sees)
            if whole is not None:
                return changed(whole, "presence", (slice(None), slice(there, None)), 0)
        raise ValueError(f"objects={wanted}: even at {SIZES[-1]:.0%} of their size there is no free place in sight for "
                         "so many")

    def table(self, what: str) -> UInt8[Tensor, "height width 3"]:
        """separation: what each scene consists of. swap_…: rows are scenes, columns those whose code they take."""
        rows = self.scenes(self.seeds, edited=what in ("swap_shape", "swap_appearance"))
        words = [f"seed {seed}" for seed in self.seeds]
        if what == "separation":
            shown = torch.cat([self.separation(scene) for scene in rows])
            return pictures.labelled_grid(shown, ["scene", "objects", "their opacity", "background"], words)
        code = what.removeprefix("swap_")
        columns = self.scenes(self.sources, edited=code != "background")
        table = [[row, *(swap(row, column, code, self.object) for column in columns)] for row in rows]
        shown = self.draw([*columns, *(scene for row in table for scene in row)])
        corner = torch.full_like(shown[:1], 255)
        return pictures.labelled_grid(torch.cat([corner, shown]),
                                      ["", *(f"{code} of {seed}" for seed in self.sources)], ["", *words])

    def draw(self, scenes: list[Scene]) -> UInt8[Tensor, "n 3 h w"]:
        return pictures.to_uint8(views.photograph(self.generator, scenes, self.camera, self.resolution).rgb)

    def separation(self, scene: Scene) -> UInt8[Tensor, "4 3 h w"]:
        """The scene; its objects cut out; how opaque they are, white for opaque; the background without them."""
        empty = dataclasses.replace(scene, presence=torch.zeros_like(scene.presence))
        whole: Any = views.photograph(self.generator, [scene], self.camera, self.resolution)
        opacity = F.interpolate(whole.object_opacity[:, None], whole.rgb.shape[-2:], mode="bilinear")[:, 0].clamp(0, 1)
        cut = opacity[:, None] * whole.rgb + (1 - opacity[:, None])
        return torch.cat([pictures.to_uint8(torch.cat([whole.rgb, cut])), pictures.grey(opacity), self.draw([empty])])


def select(scene: Scene, objects: Tensor | slice) -> Scene:
    return dataclasses.replace(scene, **{key: getattr(scene, key)[:, objects] for key in OF_OBJECTS})


def join(scene: Scene, others: Sequence[Scene]) -> Scene:
    """The scene with the objects of the others; the background stays."""
    return dataclasses.replace(scene, **{key: torch.cat([getattr(one, key) for one in (scene, *others)], dim=1)
                                         for key in OF_OBJECTS})


def changed(scene: Scene, key: str, index: tuple[slice | int, ...], value: Tensor | Number) -> Scene:
    """The scene with one of its tensors changed at `index`."""
    tensor = getattr(scene, key).clone()
    tensor[index] = value
    return dataclasses.replace(scene, **{key: tensor})


# Over time


def swing(start: Tensor, low: Number | Tensor, high: Number | Tensor, phase: float) -> Tensor:
    """From `start` through all of [low, high] and back, slower near the ends."""
    low, high = torch.as_tensor(low).to(start), torch.as_tensor(high).to(start)
    middle, half = (low + high) / 2, (high - low) / 2
    begin = torch.asin(((start - middle) / half).clamp(-1, 1))
    return torch.where(torch.tensor(phase) == 0, start, middle + half * torch.sin(begin + 2 * math.pi * phase))


def rotate(scene: Scene, phase: float, *, object: int, layout: Any) -> Scene:
    """The object turns about its axis: once around, or through the angles that training knows."""
    start, (low, high) = scene.rotation[:, object], layout.rotation
    if 0 < high - low < 359:
        angle = swing(start, math.radians(low), math.radians(high), phase)
    else:  # also where objects never turn, for there would be nothing to see
        angle = start + 2 * math.pi * phase
    return changed(scene, "rotation", (slice(None), object), angle)


def move(scene: Scene, phase: float, *, object: int, layout: Any) -> Scene:
    """Along x and back, then along y and back, as far as in training; where it is 0, by the object's half side."""
    axis = int(phase >= 0.5)
    start, side = scene.translation[:, object, axis], scene.scale[:, object, axis]
    low, high = (corner[axis] for corner in layout.translation)
    if low == high:
        low, high = start - side, start + side
    return changed(scene, "translation", (slice(None), object, axis), swing(start, low, high, 2 * phase % 1))


def grow(scene: Scene, phase: float, *, object: int, factor: Number) -> Scene:
    """`factor` times as large, then as small. Its middle stays where it is."""
    size = scene.scale[:, object] * factor ** math.sin(2 * math.pi * phase)
    return changed(scene, "scale", (slice(None), object), size)


def appear(scene: Scene, phase: float) -> Scene:
    """Objects that are not present come one after the other, and go again in the opposite order."""
    hidden = torch.nonzero(scene.presence[0] == 0)[:, 0].tolist()
    level = (len(hidden) + 1) * (1 - abs(2 * phase - 1)) - 0.5  # half an object's time of rest at both ends
    for turn, number in enumerate(hidden):
        there = min(max(level - turn, 0.0), 1.0)
        scene = changed(scene, "presence", (slice(None), number), there**3)  # a thin density hides much already
    return scene


def vanish(scene: Scene, phase: float) -> Scene:
    """All objects go, the last one first, and come back."""
    empty = dataclasses.replace(scene, presence=torch.zeros_like(scene.presence))
    return appear(empty, (phase + 0.5) % 1)


# More objects than there were


def resized(scene: Scene, size: Number) -> Scene:
    """All objects times `size`. What stood on z = 0 stands there still."""
    return dataclasses.replace(scene, scale=size * scene.scale,
                               translation=scene.translation * scene.translation.new_tensor([1, 1, size]))


def crowd(scene: Scene, others: Sequence[Scene], layout: Any, seed: int, sees: Callable[[Tensor, Tensor], Tensor]
          ) -> Scene | None:
    """The scene with the objects of the others, each at a free place of its own; None if one finds none.

    Args:
        seed: of the places.
        sees: centres `[m 3]` and reach of an object → which of them will do, `[m]`.
    """
    rng = torch.Generator().manual_seed(seed)
    for other in others:
        for number in range(other.presence.shape[1]):
            new = select(other, slice(number, number + 1))
            place = free_place(scene, new, layout, rng, sees)
            if place is None:
                return None
            scene = join(scene, [dataclasses.replace(new, translation=place)])
    return scene


def reach(scene: Scene) -> Float[Tensor, " n"]:
    """Of each object's box from its axis: half the diagonal of the ground under it, however it is turned."""
    return scene.scale[0, :, :2].norm(dim=-1)


def free_place(scene: Scene, new: Scene, layout: Any, rng: torch.Generator, sees: Callable[[Tensor, Tensor], Tensor]
               ) -> Float[Tensor, "1 1 3"] | None:
    """Where the new object touches no other: where training puts objects, else around there, as near as possible."""
    low, high = torch.tensor(layout.translation).to(new.translation)[:, :2]
    middle, half = (low + high) / 2, torch.maximum((high - low) / 2, reach(new) / 4)
    for _ in range(24):  # to 13 times as far
        ground = middle + half * (2 * torch.rand(CANDIDATES, 2, generator=rng).to(half) - 1)
        places = torch.cat([ground, new.translation[0, :, 2:].expand(CANDIDATES, 1)], dim=1)
        apart = torch.cdist(ground, scene.translation[0, :, :2])
        free = (apart >= reach(scene) + reach(new)).all(-1) & sees(places, reach(new))
        if bool(free.any()):
            return places[free][:1, None]
        half = 1.12 * half
    return None


def in_sight(
    camera: Camera, bounds: Bounds, centres: Float[Tensor, "m 3"], reach: Float[Tensor, " 1"]
) -> Bool[Tensor, " m"]:
    """Which objects have their middle in the picture, 15 % from its edges, and all of themselves between near and far.
    """
    camera = camera.to(centres.device)
    local = (centres - camera.position[0]) @ camera.camera_to_world[0, :3, :3]
    image = local @ camera.intrinsics[0].T
    place, distance = image[:, :2] / image[:, 2:], local.norm(dim=-1)
    deep = (distance - reach > bounds.near) & (distance + reach < bounds.far) & (local[:, 2] > 0)
    if bounds.aabb is not None:
        low, high = torch.tensor(bounds.aabb).to(centres)[..., :2]
        deep &= ((centres[:, :2] - reach > low) & (centres[:, :2] + reach < high)).all(-1)
    return deep & ((place > 0.15) & (place < 0.85)).all(-1)


# Exchange


def swap(scene: Scene, donor: Scene, code: str, object: int) -> Scene:
    """The scene with the donor's background, or with the shape or appearance of the donor's object of that number."""
    if code == "background":
        return dataclasses.replace(scene, **{key: getattr(donor, key) for key in OF_BACKGROUND})
    return changed(scene, code, (slice(None), object), getattr(donor, code)[:, object])
