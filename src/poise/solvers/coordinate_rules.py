"""Which block comes next.

    random, cyclic, perm    without looking at the gradient; lipschitz samples in proportion to L
    gs          max  ||s_b||^2                 s the gradient, or the least subgradient where there is a penalty (GS-s)
    gsl         max  ||s_b||^2 / L_b           variable blocks: sum of s_i^2 / L_i
    gsd         max  sum s_i^2 / D_i           D_i = sum_j |H_ij| or block_size L_i, so diag(D_b) >= H_b: the top entries are the maximum
    gsq         max  grad_b' H_b^-1 grad_b     the largest guaranteed progress; fixed blocks, or every block of few coordinates
    gsq_iht     the same by iterative hard thresholding with the step 1 / lambda_max(H)
    gsq_niht    the same in coordinates scaled by sqrt(L_i), with the step that is best on the support
    gs_r        max  ||proximal step||^2
    gs_q        min  of the model with h, one entry or group at a time
    forest      the nodes of highest gsl score whose graph is a forest

Greedy rules see the whole gradient. Equal scores go to the lower index, and coordinates that cannot make progress stay out.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from poise.errors import IncompatibleError, InputError
from poise.operators import largest
from poise.solvers.coordinate_losses import CoordinateSmooth, State, block_lipschitz
from poise.solvers.coordinate_partitions import Partition, graph_of
from poise.solvers.coordinate_penalty import Blockwise, Charge
from poise.solvers.message_passing import greedy_forest

__all__ = ["GREEDY", "RULES", "Scene"]

ENUMERATED = 200_000
"""Most blocks that gsq looks at one by one."""
IHT_STEPS = 10


@dataclass
class Scene:
    """What a run's rules and updates look at, beside its state.

    Attributes:
        smooth, charge: f and h.
        block_size: coordinates of a variable block.
        partition: fixed blocks, or None for variable ones.
        diagonal: D of gsd and of the diagonal update, [size].
        generator: of random rules.
        turn: blocks chosen so far.
        estimates: the Lipschitz constants that backtracking has found, of blocks or coordinates.
        inverses: the blocks that gsq looks at, filled up with -1, and the inverse of H_b of each.
    """

    smooth: CoordinateSmooth
    charge: Charge
    block_size: int
    partition: Partition | None
    generator: torch.Generator
    rows: bool = True
    turn: int = 0
    permutation: Tensor | None = None
    estimates: Tensor | None = None
    forest_size: int | None = None
    solves: int = 0
    evaluations: int = 0
    inverses: tuple[Tensor, Tensor] | None = None

    @cached_property
    def diagonal(self) -> Tensor:
        if self.rows:
            return self.smooth.row_sums
        sizes = (
            self.block_size if self.partition is None else torch.bincount(self.partition.owner)[self.partition.owner]
        )
        return self.smooth.lipschitz * sizes

    @cached_property
    def constants(self) -> Tensor:
        """L_b of every fixed block."""
        assert self.partition is not None
        found = [block_lipschitz(self.smooth, block) for block in self.partition.blocks]
        return self.smooth.lipschitz.new_tensor(found)

    @cached_property
    def usable(self) -> Tensor:
        """The coordinates on which f depends."""
        return (self.smooth.lipschitz > 0).nonzero()[:, 0]

    def block_constant(self, block: Tensor) -> float:
        """Return L_b; fixed blocks know theirs."""
        if self.partition is not None:
            return float(self.constants[self.partition.owner[block[0]]])
        return block_lipschitz(self.smooth, block)


def _pick(scene: Scene, scores: Tensor) -> Tensor:
    """Return the block of highest score: of entries (or of groups) that add up over a fixed block, or the top entries."""
    part = scene.partition
    if part is None:
        block = (largest(scores, scene.block_size) & (scores > 0)).nonzero()[:, 0]
        return block
    sums = scores if len(scores) == len(part) != len(part.owner) else _over_blocks(part, scores)
    best = int(sums.argmax())
    return part.blocks[best] if float(sums[best]) > 0 else part.blocks[best][:0]


def _over_blocks(part: Partition, scores: Tensor) -> Tensor:
    return scores.new_zeros(len(part)).index_add(0, part.owner, scores)


def _divide(scores: Tensor, by: Tensor) -> Tensor:
    return torch.where(by > 0, scores / torch.where(by > 0, by, 1.0), 0.0)


# ---- without the gradient --------------------------------------------------------------------------------------------


def random_block(scene: Scene, state: State) -> Tensor:
    """Draw a block uniformly."""
    if scene.partition is not None:
        number = int(torch.randint(len(scene.partition), (1,), generator=scene.generator))
        return scene.partition.blocks[number]
    order = torch.randperm(len(scene.usable), generator=scene.generator)[: scene.block_size]
    return scene.usable[order.to(scene.usable.device)].sort().values


def cyclic_block(scene: Scene, state: State) -> Tensor:
    """Take blocks in their order."""
    if scene.partition is not None:
        return scene.partition.blocks[scene.turn % len(scene.partition)]
    parts: tuple[Tensor, ...] = torch.split(scene.usable, scene.block_size)
    return parts[scene.turn % len(parts)]


def permuted_block(scene: Scene, state: State) -> Tensor:
    """Take blocks in an order that is drawn anew for every pass."""
    items = len(scene.usable) if scene.partition is None else len(scene.partition)
    width = scene.block_size if scene.partition is None else 1
    turn = scene.turn % math.ceil(items / width)
    if turn == 0 or scene.permutation is None:
        scene.permutation = torch.randperm(items, generator=scene.generator)
    chosen = scene.permutation[turn * width : (turn + 1) * width]
    if scene.partition is not None:
        return scene.partition.blocks[int(chosen)]
    return scene.usable[chosen.to(scene.usable.device)].sort().values


def lipschitz_block(scene: Scene, state: State) -> Tensor:
    """Draw a block in proportion to L_b, or coordinates in proportion to L_i."""
    if scene.partition is not None:
        number = int(torch.multinomial(scene.constants.cpu(), 1, generator=scene.generator))
        return scene.partition.blocks[number]
    size = min(scene.block_size, len(scene.usable))
    drawn = torch.multinomial(scene.smooth.lipschitz.cpu(), size, generator=scene.generator)
    return drawn.to(scene.usable.device).sort().values


# ---- greedy ----------------------------------------------------------------------------------------------------------


def gs_block(scene: Scene, state: State) -> Tensor:
    return _pick(scene, scene.charge.distance(state.x, state.gradient).square())


def gsl_block(scene: Scene, state: State) -> Tensor:
    squares = scene.charge.distance(state.x, state.gradient).square()
    if scene.partition is None:
        return _pick(scene, _divide(squares, scene.smooth.lipschitz))
    sums = squares if isinstance(scene.charge, Blockwise) else _over_blocks(scene.partition, squares)
    constants = scene.constants if scene.estimates is None else scene.estimates
    best = int(_divide(sums, constants).argmax())
    return scene.partition.blocks[best] if float(sums[best]) > 0 else scene.partition.blocks[best][:0]


def gsd_block(scene: Scene, state: State) -> Tensor:
    if isinstance(scene.charge, Blockwise):
        raise IncompatibleError("BlockCoordinate: gsd scores entries; with a group lasso use gs, gsl or gs_q.")
    return _pick(scene, _divide(scene.charge.distance(state.x, state.gradient).square(), scene.diagonal))


def _curvatures(scene: Scene) -> Tensor:
    """Return the constant by which a single coordinate's step is judged: its own, or that of its fixed block."""
    return scene.smooth.lipschitz if scene.partition is None else scene.constants[scene.partition.owner]


def _proximal_steps(scene: Scene, state: State) -> tuple[Tensor, Tensor]:
    curvature = _curvatures(scene)
    safe = torch.where(curvature > 0, curvature, 1.0)
    d = scene.charge.prox(state.x - state.gradient / safe, 1.0 / safe) - state.x
    return torch.where(curvature > 0, d, 0.0), curvature


def gs_r_block(scene: Scene, state: State) -> Tensor:
    return _pick(scene, _proximal_steps(scene, state)[0].square())


def gs_q_block(scene: Scene, state: State) -> Tensor:
    d, curvature = _proximal_steps(scene, state)
    squares = 0.5 * curvature * d.square()
    progress = -(state.gradient * d + squares)
    if not scene.charge.free:
        charged = scene.charge.shares(state.x + d) - scene.charge.shares(state.x)
        if isinstance(scene.charge, Blockwise):
            assert scene.partition is not None
            progress, squares = _over_blocks(scene.partition, progress), _over_blocks(scene.partition, squares)
        progress = progress - charged
    # The progress of a convex penalty is at least L/2 d^2, which remains where the difference of values is lost to rounding.
    return _pick(scene, torch.maximum(progress, squares if scene.charge.convex else 1e-12 * squares))


def gsq_block(scene: Scene, state: State) -> Tensor:
    _refuse_penalty(scene, "gsq")
    if scene.inverses is None:
        blocks = _candidates(scene)
        width = blocks.shape[1]
        scene.inverses = blocks, torch.stack([_pseudo_inverse(scene.smooth, b[b >= 0], width) for b in blocks])
    blocks, inverse = scene.inverses
    g = torch.where(blocks >= 0, state.gradient[blocks.clamp_min(0)], 0.0)
    scores = torch.einsum("bi,bij,bj->b", g, inverse, g)
    best = blocks[int(scores.argmax())]
    return best[best >= 0] if float(scores.max()) > 0 else best[:0]


def _candidates(scene: Scene) -> Tensor:
    """Return blocks one below the other, the short ones filled up with -1."""
    if scene.partition is not None:
        return torch.nn.utils.rnn.pad_sequence(scene.partition.blocks, batch_first=True, padding_value=-1)
    size = min(scene.block_size, scene.smooth.size)
    number = math.comb(scene.smooth.size, size)
    if number > ENUMERATED:
        raise InputError(
            f"BlockCoordinate: gsq would look at {number:,} blocks of {size} among {scene.smooth.size} coordinates, "
            f"and {ENUMERATED:,} is the "
            "most. Use select='gsq_iht', or a partition."
        )
    return torch.tensor(list(itertools.combinations(range(scene.smooth.size), size)), device=scene.usable.device)


def _pseudo_inverse(smooth: CoordinateSmooth, block: Tensor, width: int) -> Tensor:
    h = smooth.bound(block)
    found = h.new_zeros(width, width)
    found[: len(block), : len(block)] = torch.linalg.pinv(h, hermitian=True)
    return found


def gsq_iht_block(scene: Scene, state: State) -> Tensor:
    """Minimise `<grad, d> + 1/2 d' H d` over sparse d: `d <- keep the largest of d - (grad + H d) / lambda_max`."""
    _refuse_penalty(scene, "gsq_iht")
    if scene.partition is not None:
        raise IncompatibleError("BlockCoordinate: gsq_iht is for variable blocks; with a partition use select='gsq'.")
    g, smooth = state.gradient, scene.smooth
    block = _pick(scene, _divide(g.square(), smooth.lipschitz))
    if len(block) == 0:
        return block
    # the authors' code starts at +grad / sqrt(L), uphill
    d = -g[block] / smooth.lipschitz[block]
    for _ in range(IHT_STEPS):
        full = torch.zeros_like(g).index_copy(0, block, d)
        moved = full - (g + smooth.bound_times(block, d)) / smooth.largest
        fresh = largest(moved.abs(), scene.block_size).nonzero()[:, 0]
        kept = torch.zeros_like(g).index_copy(0, fresh, moved[fresh])
        block, d = fresh, moved[fresh]
        if float((kept - full).norm()) < 1e-10 * max(1.0, float(full.norm())):
            break
    return block


def gsq_niht_block(scene: Scene, state: State) -> Tensor:
    """Normalised iterative hard thresholding in `u = sqrt(L) d`; a step that does not lower the model is halved.

    `lambda_max(H)` of ill-scaled columns is so large that a step of gsq_iht leaves the first block as it is.
    """
    _refuse_penalty(scene, "gsq_niht")
    if scene.partition is not None:
        raise IncompatibleError("BlockCoordinate: gsq_niht is for variable blocks; with a partition use select='gsq'.")
    root = scene.smooth.lipschitz.sqrt()
    g = _divide(state.gradient, root)

    def times(u: Tensor, block: Tensor) -> Tensor:
        return _divide(scene.smooth.bound_times(block, u[block] / root[block]), root)

    block = _pick(scene, g.square())
    u = torch.zeros_like(g).index_copy(0, block, -g[block])
    hu = times(u, block)
    value = float(g @ u + 0.5 * u @ hu)
    for _ in range(IHT_STEPS):
        left = g + hu
        inside = torch.zeros_like(g).index_copy(0, block, left[block])
        bend = float(inside @ times(inside, block))
        length = float(inside @ inside) / bend if bend > 0 else 0.0
        for _ in range(8):
            moved = u - length * left
            fresh = (largest(moved.abs(), scene.block_size) & (moved != 0)).nonzero()[:, 0]
            kept = torch.zeros_like(g).index_copy(0, fresh, moved[fresh])
            h_kept = times(kept, fresh)
            trial = float(g @ kept + 0.5 * kept @ h_kept)
            if trial < value - 1e-12 * abs(value):
                break
            length /= 2.0
        else:
            return block
        block, u, hu, value = fresh, kept, h_kept, trial
    return block


def _refuse_penalty(scene: Scene, rule: str) -> None:
    if not scene.charge.free:
        raise IncompatibleError(f"BlockCoordinate: {rule} knows no penalty. Use select='gs_q', which scores with it.")


def forest_block(scene: Scene, state: State) -> Tensor:
    scores = _divide(scene.charge.distance(state.x, state.gradient).square(), scene.smooth.lipschitz)
    scores = torch.where(scene.smooth.lipschitz > 0, scores, -math.inf)
    if not bool((scores > 0).any()):
        return scene.usable[:0]
    return greedy_forest(scores, graph_of(scene.smooth, "select='forest'"), scene.forest_size)


Rule = Callable[[Scene, State], Tensor]
GREEDY: dict[str, Rule] = {
    "forest": forest_block,
    "gs": gs_block,
    "gs_q": gs_q_block,
    "gs_r": gs_r_block,
    "gs_s": gs_block,
    "gsd": gsd_block,
    "gsl": gsl_block,
    "gsq": gsq_block,
    "gsq_iht": gsq_iht_block,
    "gsq_niht": gsq_niht_block,
}
RULES: dict[str, Rule] = {
    **GREEDY,
    "cyclic": cyclic_block,
    "lipschitz": lipschitz_block,
    "perm": permuted_block,
    "random": random_block,
}
