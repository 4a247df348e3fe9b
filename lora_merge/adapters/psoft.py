"""PSOFT: the r principal components of a weight, turned among themselves, `W' = W + s B (R - I) A`, `B A = W_r / s`.

| after the path of a module | shape |
|---|---|
| `psoft_R.weight` | `[r (r - 1) / 2]`, the upper triangle of a skew Q, R is its Cayley transform; or R `[r, r]` |
| `psoft_R.vector_a`, `psoft_R.vector_b` | `[r]`, R's columns and rows are multiplied with them |

A and B come from the singular value decomposition of the base. `ab_svd_init` gives the singular values to B, or their
roots to both. `psoft_svd: lowrank` is the randomised one, drawn from `random_seed`. `s = psoft_alpha / r`.
Components may have either sign, and R depends on which: they are computed as PEFT does on a CPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lora_merge.adapters.base import Bound, Claim, Needs, Options, Patch, Reading
from lora_merge.adapters.config_fields import flag, number, positive
from lora_merge.adapters.linear import Linear, Span
from lora_merge.adapters.lowrank import FLOAT, Read
from lora_merge.adapters.modules import Kind, Module
from lora_merge.adapters.oft import MOST_TERMS, series
from lora_merge.adapters.projections import seed
from lora_merge.adapters.residual import factorisation_bytes
from lora_merge.adapters.rotation import cayley
from lora_merge.adapters.seats import OPEN
from lora_merge.errors import AdapterError, printable, quoted
from lora_merge.spec import Location, TensorSpec

if TYPE_CHECKING:
    import torch

R, COLUMNS, ROWS = "psoft_R.weight", "psoft_R.vector_a", "psoft_R.vector_b"
FIELDS = (
    "r", "psoft_alpha", "psoft_dropout", "ab_svd_init", "psoft_svd", "psoft_svd_lowrank_niter", "random_seed",
    "psoft_orth", "psoft_mag_a", "psoft_mag_b", "use_cayley_neumann", "num_cayley_neumann_terms", "cayley_neumann_eps",
)  # fmt: skip
KIND = Kind("psoft", (R, COLUMNS, ROWS), fields=FIELDS, nonempty=True)
MOST_ROUNDS = 1000
SIGNS = (
    "The components that PSOFT turns are computed again from the base; their signs are those of a CPU. An adapter "
    "that was trained on another device may have had others, which no file tells."
)
"""For the person who merges."""


@dataclass(frozen=True, slots=True)
class Turning:
    """How R and the components are made, from the config.

    r, scale: of all modules. orthogonal: R is made of a skew matrix; terms: by so long a series, None: exactly.
    eps: the largest norm of Q for the series. symmetric: A has the roots of the singular values too.
    rounds: power iterations of the randomised decomposition, drawn from `key`; None: the full one.
    """

    r: int
    scale: float
    orthogonal: bool
    terms: int | None
    eps: float | None
    symmetric: bool
    rounds: int | None
    key: int

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> Turning:
        """Raises AdapterError for broken fields."""
        r = positive(config.get("r", 32), "r")
        terms = positive(config.get("num_cayley_neumann_terms", 5), "num_cayley_neumann_terms")
        rounds = positive(config.get("psoft_svd_lowrank_niter", 10), "psoft_svd_lowrank_niter")
        if terms > MOST_TERMS or rounds > MOST_ROUNDS:
            raise AdapterError(f"adapter_config.json: {terms} terms and {rounds} rounds are more than any training has")
        eps = config.get("cayley_neumann_eps")
        return cls(
            r,
            number(config.get("psoft_alpha", 32), "psoft_alpha") / r,
            flag({"psoft_orth": True, **config}, "psoft_orth"),
            terms if flag(config, "use_cayley_neumann") else None,
            None if eps is None else number(eps, "cayley_neumann_eps"),
            _either(config, "ab_svd_init", "psoft_init", "pissa_init"),
            rounds if _either(config, "psoft_svd", "full", "lowrank") else None,
            seed(config.get("random_seed", 0), "random_seed"),
        )

    def matrix(self, stored: torch.Tensor) -> torch.Tensor:
        """R `[r, r]` without its vectors."""
        import torch

        if not self.orthogonal:
            return stored
        upper = torch.triu_indices(self.r, self.r, 1, device=stored.device)
        skew = stored.new_zeros(self.r, self.r)
        skew[upper[0], upper[1]] = stored
        skew = skew - skew.T
        if self.terms is None:
            return cayley(-skew)
        norm = torch.linalg.norm(skew)
        if self.eps is not None and bool(torch.isfinite(norm)) and float(norm) > self.eps:
            skew = skew * (self.eps / (norm + 1e-12))
        return series(skew.unsqueeze(0), self.terms)[0]

    def components(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """B `[out, r]` and A `[r, in]` of a float32 weight `[out, in]`."""
        import torch

        if self.rounds is None:
            u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        else:
            u, s, vh = _drawn(weight, self.r, self.rounds, self.key)
        u, s, vh = u[:, : self.r], s[: self.r] / self.scale, vh[: self.r]
        if self.symmetric:
            return u * s.sqrt(), s.sqrt().unsqueeze(1) * vh
        return u * s, vh


def _either(config: Mapping[str, Any], field: str, first: str, second: str) -> bool:
    """Whether a field has the second of its two words; the first is its default."""
    value = config.get(field, first)
    if value not in (first, second):
        raise AdapterError(f"adapter_config.json: {field} is {quoted(value)}, expected {first} or {second}")
    return bool(value == second)


def _drawn(weight: torch.Tensor, r: int, rounds: int, key: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The randomised decomposition that torch makes after this seed: u `[out, r]`, s `[r]`, vh `[r, in]`."""
    import torch

    turned = weight.shape[0] < weight.shape[1]
    seen = weight.T if turned else weight
    start = torch.randn(seen.shape[1], r, generator=torch.Generator().manual_seed(key)).to(weight.device)
    basis = torch.linalg.qr(seen @ start).Q
    for _ in range(rounds):
        basis = torch.linalg.qr(seen.T @ basis).Q
        basis = torch.linalg.qr(seen @ basis).Q
    u, s, vh = torch.linalg.svd(basis.T @ seen, full_matrices=False)
    u = basis @ u
    return (vh.T, s, u.T) if turned else (u, s, vh)


@dataclass(frozen=True, slots=True)
class Psoft(Patch):
    """names: of R, and of its vectors over columns and rows, None where it has none. shape: `out, in`."""

    names: tuple[str, str | None, str | None]
    turning: Turning
    shape: tuple[int, int]
    span: Span
    kind: str = "psoft"

    @property
    def factors(self) -> tuple[str, ...]:
        return tuple(name for name in self.names if name)

    @property
    def needs(self) -> Needs:
        return Needs.WHOLE

    def workspace(self, weight: TensorSpec) -> int:
        r = self.turning.r
        return factorisation_bytes(self.shape) + (12 * r * r + 3 * r * sum(self.shape)) * FLOAT

    def bind(self, read: Read, weight: TensorSpec) -> BoundPsoft:
        import torch

        matrix = self.turning.matrix(read(self.names[0]).float())
        columns, rows = (read(name).float() if name else None for name in self.names[1:])
        matrix = matrix if rows is None else rows.unsqueeze(1) * matrix
        matrix = matrix if columns is None else matrix * columns
        return BoundPsoft(self, matrix - torch.eye(len(matrix), device=matrix.device))


class BoundPsoft(Bound):
    """matrix: R - I."""

    def __init__(self, patch: Psoft, matrix: torch.Tensor) -> None:
        self.patch = patch
        self.matrix = matrix

    def apply(self, rows: torch.Tensor, start: int) -> torch.Tensor:
        """rows: all rows of the tensor."""
        span, turning = self.patch.span, self.patch.turning
        weight = rows[span.first : span.first + span.count]
        left, right = turning.components(weight)
        weight.add_((left @ self.matrix) @ right, alpha=turning.scale)
        return rows


def read(config: Mapping[str, Any], tensors: Mapping[str, TensorSpec], options: Options) -> Reading:
    """Claims of every tensor of a PSOFT adapter."""
    turning = Turning.from_json(config)
    r = turning.r

    def claims(module: Module) -> Iterator[Claim]:
        vectors = [role for role in (COLUMNS, ROWS) if role in module.keys]
        module.sizes(
            **{R: str(r * (r - 1) // 2) if turning.orthogonal else f"{r} {r}"}, **dict.fromkeys(vectors, str(r))
        )
        names = module.names(R)[0], module.keys.get(COLUMNS), module.keys.get(ROWS)
        layer = Linear(module.path, OPEN, OPEN, module.shown)

        def build(location: Location, weight: TensorSpec) -> Psoft:
            span = layer.span(location, weight)
            shape = span.count, weight.shape[-1]
            if location.rows or span.stacked is not None or r > min(shape):
                raise module.misfit(f"a weight that is stored whole; {printable(location.tensor)} is {weight}")
            return Psoft(names, turning, shape, span)

        yield Claim(module.path, "weight", module.factors, build, shape=layer.shape)

    reading = KIND.read(config, tensors, options, claims)
    return replace(reading, notes=(*reading.notes, SIGNS))
