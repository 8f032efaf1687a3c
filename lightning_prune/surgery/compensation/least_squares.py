"""Least squares with a prior: the linear map that is nearest to another and fits what was seen."""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Moments", "fit_moments", "fit_samples"]

RIDGE = 1e-2  # of the mean variance of the inputs, where they explain nothing of the outputs
_FLOOR = 1e-12
_BLOCK = 2**22  # numbers in double precision at a time


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
        x = inputs.double().mean(0)
        y = outputs.double().mean(0)
        xx = x.new_zeros(len(x), len(x))
        yx = x.new_zeros(len(y), len(x))
        return cls(0, x, y, torch.zeros_like(x), torch.zeros_like(y), xx, yx, torch.zeros_like(y))

    def add(self, inputs: Tensor, outputs: Tensor) -> None:
        """Add samples.

        Args:
            inputs: (n, inputs).
            outputs: (n, outputs).
        """
        rows = max(1, _BLOCK // max(len(self.x), len(self.y)))
        for some_inputs, some_outputs in zip(inputs.split(rows), outputs.split(rows), strict=True):
            x = some_inputs.double() - self.shift_x
            y = some_outputs.double() - self.shift_y
            self.count += len(x)
            self.x += x.sum(0)
            self.y += y.sum(0)
            self.xx.addmm_(x.T, x)
            self.yx.addmm_(y.T, x)
            self.yy += y.square().sum(0)

    @property
    def mean_x(self) -> Tensor:
        """(inputs,) mean."""
        return self.shift_x + self.x / self.count

    @property
    def mean_y(self) -> Tensor:
        """(outputs,) mean."""
        return self.shift_y + self.y / self.count

    def about(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the second moments about two points: of inputs, of outputs with inputs, of outputs alone."""
        from_x = self.mean_x - x
        from_y = self.mean_y - y
        x_mean = self.x / self.count
        y_mean = self.y / self.count
        xx = self.xx / self.count - torch.outer(x_mean, x_mean) + torch.outer(from_x, from_x)
        yx = self.yx / self.count - torch.outer(y_mean, x_mean) + torch.outer(from_y, from_x)
        yy = self.yy / self.count - y_mean.square() + from_y.square()
        return xx, yx, yy


def fit_moments(moments: Moments, prior: Tensor, intercept: bool) -> Tensor:
    """Return the map from inputs to outputs that fits moments, where nothing is known like a prior one.

    The ridge that draws it to the prior is in proportion to what inputs leave unexplained of the outputs: a map that
    fits exactly is found exactly.

    Args:
        moments: What was seen.
        prior: (outputs, inputs) float64.
        intercept: Whether the map is to be about the deviations from the means, and the rest is for a bias.

    Returns:
        (outputs, inputs) float64.
    """
    x, y = moments.mean_x, moments.mean_y
    if not intercept:
        x, y = torch.zeros_like(x), torch.zeros_like(y)
    xx, yx, yy = moments.about(x, y)
    scale = xx.diagonal().mean()
    if not scale > 0:
        return prior
    rest = yx - prior @ xx
    first = prior + _solved(xx, rest, _FLOOR * scale)
    unexplained = (yy - 2 * (first * yx).sum(1) + (first @ xx * first).sum(1)).sum() / yy.sum()
    share = 1.0
    if moments.count > len(x):
        share = min(1.0, max(0.0, float(unexplained)) * moments.count / (moments.count - len(x)))
    ridge = max(RIDGE * share, _FLOOR)
    return prior + _solved(xx, rest, ridge * scale)


def _solved(matrix: Tensor, rest: Tensor, ridge: Tensor) -> Tensor:
    """Return ``rest`` times the inverse of a matrix with a ridge, which grows until the matrix is positive."""
    for _ in range(12):
        regular = matrix.clone()
        regular.diagonal().add_(ridge)
        factor, failed = torch.linalg.cholesky_ex(regular)
        if not failed:
            break
        ridge = ridge * 10
    found = torch.cholesky_solve(rest.T, factor).T
    # Once more for what the ridge has kept from being fitted: directions that are known are then exact.
    return found + torch.cholesky_solve((rest - found @ matrix).T, factor).T


def fit_samples(inputs: Tensor, outputs: Tensor, prior: Tensor, intercept: bool) -> Tensor:
    """Return the map that fits samples, as `fit_moments` does, at the cost of their number if that is smaller.

    Args:
        inputs: (n, inputs).
        outputs: (n, outputs).
        prior: (outputs, inputs) float64.
        intercept: As in `fit_moments`.
    """
    if len(inputs) > inputs.shape[1]:
        moments = Moments.like(inputs, outputs)
        moments.add(inputs, outputs)
        return fit_moments(moments, prior, intercept)
    x, y = inputs.double(), outputs.double()
    if intercept:
        x = x - x.mean(0)
        y = y - y.mean(0)
    products = x @ x.T
    scale = products.diagonal().sum() / x.shape[1]
    if not scale > 0:
        return prior
    products.diagonal().add_(RIDGE * scale)
    rest = y - x @ prior.T
    return prior + torch.cholesky_solve(rest, torch.linalg.cholesky(products)).T @ x
