"""Least squares with a prior: the linear map that is nearest to another and fits what was seen."""

from dataclasses import dataclass, replace
from math import inf

import torch
from torch import Tensor

__all__ = ["Moments", "fit_apart", "fit_moments", "fit_samples", "set_aside"]

RIDGE = 1e-3  # of the mean variance of the inputs, where they explain nothing of the outputs
_RIDGES = (1e-2, 1e-1, 1.0, 10.0, inf)  # that are tried beside it where samples are few; the last leaves what there was
_PLENTY = 16  # samples for each input, from which on they are not few
_ONE_OF = 4  # so many owners of samples, one is set aside
_FLOOR = 1e-12
_EXACT = 1e-10  # a smaller ridge is that of a map that fits exactly
_ATTEMPTS = 13  # to make a matrix positive, up to a ridge of ten times its mean diagonal
_BLOCK = 2**22  # numbers in double precision at a time
_STRIPES = 4  # of columns that are multiplied with each other and with those behind them
_NARROW = 64  # columns: stripes gain nothing by being narrower


@dataclass
class Moments:
    """Means and covariances of inputs and outputs, summed over blocks.

    Attributes:
        count: Number of samples.
        shift_x: (inputs,) what is subtracted before summing: the mean of the first block, so that sums stay small.
        shift_y: (outputs,) the same.
        x: (inputs,) sums.
        y: (outputs,) sums.
        xx: (inputs, inputs) sums of products.
        yx: (outputs, inputs) sums of products.
        yy: (outputs,) sums of squares.
    """

    count: int
    shift_x: Tensor
    shift_y: Tensor
    x: Tensor
    y: Tensor
    xx: Tensor
    yx: Tensor
    yy: Tensor

    @classmethod
    def like(cls, inputs: Tensor, outputs: Tensor) -> "Moments":
        """Return moments of nothing yet, to which blocks like these can be added."""
        shift_x = inputs.double().mean(0)
        shift_y = outputs.double().mean(0)
        xx = shift_x.new_zeros(len(shift_x), len(shift_x))
        yx = shift_x.new_zeros(len(shift_y), len(shift_x))
        return cls(
            count=0,
            shift_x=shift_x,
            shift_y=shift_y,
            x=torch.zeros_like(shift_x),
            y=torch.zeros_like(shift_y),
            xx=xx,
            yx=yx,
            yy=torch.zeros_like(shift_y),
        )

    def add(self, inputs: Tensor, outputs: Tensor) -> None:
        """Add samples.

        Args:
            inputs: (n, inputs).
            outputs: (n, outputs).
        """
        widest = max(len(self.x), len(self.y))
        rows = max(1, _BLOCK // widest)
        blocks = zip(inputs.split(rows), outputs.split(rows), strict=True)
        for some_inputs, some_outputs in blocks:
            x = _less(some_inputs, self.shift_x)
            y = _less(some_outputs, self.shift_y)
            self.count += len(x)
            self.x += x.sum(0)
            self.y += y.sum(0)
            _add_products(self.xx, x)
            self.yx.addmm_(y.T, x)
            self.yy += y.square().sum(0)

    def empty(self) -> "Moments":
        """Return moments of nothing yet, about the same shift as these: they can be joined."""
        return replace(
            self,
            count=0,
            x=torch.zeros_like(self.x),
            y=torch.zeros_like(self.y),
            xx=torch.zeros_like(self.xx),
            yx=torch.zeros_like(self.yx),
            yy=torch.zeros_like(self.yy),
        )

    def join(self, other: "Moments") -> None:
        """Add what another has summed about the same shift."""
        self.count += other.count
        self.x += other.x
        self.y += other.y
        self.xx += other.xx
        self.yx += other.yx
        self.yy += other.yy

    def of_some(self, kept: Tensor) -> "Moments":
        """Return the moments of some of the inputs, with all of them as outputs.

        Args:
            kept: (n,) int64 inputs.
        """
        of_kept = self.xx[kept]
        return Moments(
            count=self.count,
            shift_x=self.shift_x[kept],
            shift_y=self.shift_x,
            x=self.x[kept],
            y=self.x.clone(),
            xx=of_kept[:, kept],
            yx=of_kept.T.contiguous(),
            yy=self.xx.diagonal().clone(),
        )

    def error(self, fitted: Tensor, constant: Tensor) -> float:
        """Return the mean squared error of a map with a constant, summed over the outputs.

        Args:
            fitted: (outputs, inputs) float64.
            constant: (outputs,) float64.
        """
        xx, yx, yy = self.second(centred=True)
        of_map = (fitted @ xx - 2 * yx) * fitted
        offset = self.mean_y - fitted @ self.mean_x - constant
        total = yy.sum() + of_map.sum() + offset.square().sum()
        return float(total)

    @property
    def mean_x(self) -> Tensor:
        """(inputs,) mean."""
        return self.shift_x + self.x / self.count

    @property
    def mean_y(self) -> Tensor:
        """(outputs,) mean."""
        return self.shift_y + self.y / self.count

    def second(self, centred: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Return the second moments: of inputs, of outputs with inputs, of outputs alone.

        Args:
            centred: About the means; else about zero.
        """
        x = self.x / self.count
        y = self.y / self.count
        xx = self.xx / self.count
        yx = self.yx / self.count
        yy = self.yy / self.count
        xx.addr_(x, x, alpha=-1)  # in place: matrices of wide layers are what takes memory here
        yx.addr_(y, x, alpha=-1)
        yy = yy - y.square()
        if centred:
            return xx, yx, yy
        xx.addr_(self.mean_x, self.mean_x)
        yx.addr_(self.mean_y, self.mean_x)
        return xx, yx, yy + self.mean_y.square()


def _less(numbers: Tensor, shift: Tensor) -> Tensor:
    """Return numbers in double precision, less a shift, in memory of their own."""
    return numbers.to(torch.float64, copy=True).sub_(shift)


def _add_products(total: Tensor, x: Tensor) -> None:
    """Add the products of all pairs of columns, each pair multiplied once.

    Args:
        total: (columns, columns), what they are added to; symmetric.
        x: (n, columns).
    """
    columns = x.shape[1]
    width = max(_NARROW, -(-columns // _STRIPES))
    for start in range(0, columns, width):
        stop = start + width
        stripe = x[:, start:stop].T
        total[start:stop, start:].addmm_(stripe, x[:, start:])
        total[stop:, start:stop] = total[start:stop, stop:].T


def fit_moments(moments: Moments, prior: Tensor, intercept: bool, ridge: float | None = None) -> Tensor:
    """Return the map from inputs to outputs that fits moments, where nothing is known like a prior one.

    The ridge that draws it to the prior is in proportion to what inputs leave unexplained of the outputs: a map that
    fits exactly is found exactly.

    Args:
        moments: What was seen.
        prior: (outputs, inputs) float64.
        intercept: Whether the map is to be about the deviations from the means, and the rest is for a bias.
        ridge: Another ridge than that, as a share of the mean variance of the inputs.

    Returns:
        (outputs, inputs) float64.
    """
    xx, yx, yy = moments.second(centred=intercept)
    scale = xx.diagonal().mean()
    if ridge == inf or not scale > 0:
        return prior
    product = prior @ xx
    rest = yx - product
    if ridge is not None:
        factor = _factor(xx, ridge * scale)
        return prior + _solved(factor, rest)
    factor = _factor(xx, _FLOOR * scale)
    unexplained = 1.0
    inputs = len(xx)
    if moments.count > inputs:
        of_prior = yy.sum() + (prior * (product - 2 * yx)).sum()
        explained = torch.linalg.solve_triangular(factor, rest.T, upper=False)
        error = of_prior - explained.square().sum()
        degrees = 1 - inputs / moments.count
        share = float(error / yy.sum())
        unexplained = min(1.0, max(0.0, share / degrees))
    ridge = RIDGE * unexplained
    if ridge > _EXACT:
        del factor
        factor = _factor(xx, ridge * scale)
        return prior + _solved(factor, rest)
    change = _solved(factor, rest)
    # Once more for what the floor has kept from being fitted: what can be exact is exact.
    missing = rest - change @ xx
    return prior + change + _solved(factor, missing)


def _factor(matrix: Tensor, ridge: Tensor) -> Tensor:
    """Return the Cholesky factor of a matrix with a ridge, which grows until there is one."""
    for _ in range(_ATTEMPTS):
        regular = matrix.clone()
        regular.diagonal().add_(ridge)
        factor, failed = torch.linalg.cholesky_ex(regular)
        if not failed:
            break
        ridge = ridge * 10
    return factor


def _solved(factor: Tensor, rest: Tensor) -> Tensor:
    """Return ``rest`` times the inverse of the matrix that a Cholesky factor is of."""
    return torch.cholesky_solve(rest.T, factor).T


def fit_samples(inputs: Tensor, outputs: Tensor, prior: Tensor, intercept: bool, owners: Tensor) -> Tensor:
    """Return the map that fits samples, as `fit_moments` does, at the cost of their number if that is smaller.

    Where they are few for so many inputs, what fits them need not fit others: some are set aside, and the ridge is
    the one with which those are told best from the rest. The same owners are set aside at each layer, and nothing is
    fitted to them there: they show what others will be like.

    Args:
        inputs: (n, inputs).
        outputs: (n, outputs).
        prior: (outputs, inputs) float64.
        intercept: As in `fit_moments`.
        owners: (n,) int64, what each comes from, such as an image: samples of one owner are set aside together.
    """
    rows, columns = inputs.shape
    if rows > _PLENTY * columns:
        moments = Moments.like(inputs, outputs)
        moments.add(inputs, outputs)
        return fit_moments(moments, prior, intercept)
    aside = set_aside(owners)
    if not bool(aside.any()):  # of the samples of so few owners some are
        numbers = torch.arange(rows, device=owners.device)
        aside = set_aside(numbers)
    if rows > columns:
        moments = Moments.like(inputs, outputs)
        others = moments.empty()
        moments.add(inputs[~aside], outputs[~aside])
        others.add(inputs[aside], outputs[aside])
        return fit_apart(moments, others, prior, intercept)
    return _fit_by_samples(inputs, outputs, prior, intercept, aside)


def set_aside(owners: Tensor) -> Tensor:
    """Return which samples are set aside where they are few: (n,) bool.

    Args:
        owners: (n,) int64, as for `fit_samples`.
    """
    return owners % _ONE_OF == _ONE_OF - 1


def fit_apart(moments: Moments, aside: Moments, prior: Tensor, intercept: bool) -> Tensor:
    """Return the map that fits moments, as `fit_moments` does, those of samples that are set aside among them.

    Where samples are few, those are left out, and the ridge is the one with which they are told best.

    Args:
        moments: Of the samples that are not set aside.
        aside: Of those that are, about the same shift.
        prior: (outputs, inputs) float64.
        intercept: As in `fit_moments`.
    """
    samples = moments.count + aside.count
    is_plenty = samples > _PLENTY * len(moments.x)
    if is_plenty or not aside.count or not moments.count:
        moments.join(aside)
        return fit_moments(moments, prior, intercept)

    def error(ridge: float | None) -> float:
        fitted = fit_moments(moments, prior, intercept, ridge)
        constant = torch.zeros_like(moments.mean_y)
        if intercept:
            constant = moments.mean_y - fitted @ moments.mean_x
        return aside.error(fitted, constant)

    ridge = min((None, *_RIDGES), key=error)
    return fit_moments(moments, prior, intercept, ridge)


def _fit_by_samples(inputs: Tensor, outputs: Tensor, prior: Tensor, intercept: bool, aside: Tensor) -> Tensor:
    """Fit by the products of the samples with each other, and the ridge that tells those best that are set aside."""
    x = inputs.double()
    y = outputs.double()
    if intercept:
        x = x - x.mean(0)
        y = y - y.mean(0)
    products = x @ x.T  # (n, n)
    variance = products.diagonal().mean() / x.shape[1]
    if not variance > 0:
        return prior
    rest = y - x @ prior.T
    [seen] = (~aside).nonzero(as_tuple=True)
    [others] = aside.nonzero(as_tuple=True)

    def shares(rows: Tensor, ridge: float) -> Tensor:
        if ridge == inf:
            return torch.zeros_like(rest[rows])
        matrix = products[rows[:, None], rows]
        factor = _factor(matrix, ridge * variance * len(rows))
        return torch.cholesky_solve(rest[rows], factor)

    def error(ridge: float) -> float:
        told = products[others[:, None], seen] @ shares(seen, ridge)
        return float((rest[others] - told).square().sum())

    ridge = min((RIDGE, *_RIDGES), key=error)
    return prior + shares(seen, ridge).T @ x[seen]
