"""Values that code looks at: what it can decide about is unprunable, and nothing else."""

import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
from engine import difference, random_plan, randomised
from torch import Tensor, nn
from torch.nn import functional

import lightning_prune as lp

REASON = "looks at values, and may do something else for others"


class Looking(nn.Module):
    """Hands features and scores to a function that looks at the scores."""

    def __init__(self, look: Callable[[nn.Module, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.look = look
        self.stem, self.score, self.head = nn.Linear(5, 8), nn.Linear(8, 1), nn.Linear(8, 3)
        self.number = 0

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        return self.head(self.look(self, x, self.score(x)))


def turned(x: Tensor, is_turned: Any) -> Tensor:
    return x.flip(1) if is_turned else x


def is_large(scores: Tensor) -> bool:
    return bool(scores.max() > 1e9)


def turned_if_large(x: Tensor, scores: Tensor) -> Tensor:
    return x.flip(1) if scores.max() > 1e9 else x


@dataclass
class Found:
    features: Tensor
    boxes: Tensor


def turned_if_far(found: Found) -> Tensor:
    return found.features.flip(1) if int(found.boxes.max()) > 1e9 else found.features


def noted(scores: Tensor, notes: list[int]) -> Tensor:
    notes.append(int(scores.max()))
    return scores * 2


def kept_in(network: Any, scores: Tensor) -> Tensor:
    network.number = int(scores.max())
    return scores * 2


def none_if_small(scores: Tensor) -> Tensor | None:
    return scores if scores.max() > 1e9 else None


def refused_if_large(scores: Tensor) -> Tensor:
    if scores.max() > 1e9:
        raise ValueError("is too large")
    return scores


def one_by_one(scores: Tensor) -> Iterator[int]:
    for score in scores:
        yield int(score)


def number_as_tensor(scores: Tensor) -> Tensor:
    return torch.tensor(int(scores.max()))


def number_written(scores: Tensor, target: Tensor) -> Tensor:
    target[0] = int(scores.max())
    return scores


def of_either(network: Any, x: Tensor, scores: Tensor) -> Tensor:
    try:
        refused_if_large(scores)
    except ValueError:
        return x.flip(1)
    return x


def of_notes(network: Any, x: Tensor, scores: Tensor) -> Tensor:
    notes: list[int] = []
    noted(scores, notes)
    return turned(x, notes[0] > 1e9)


def of_attribute(network: Any, x: Tensor, scores: Tensor) -> Tensor:
    holder = Found(scores, scores)
    kept_in(holder, scores)
    return turned(x, holder.number > 1e9)  # type: ignore[attr-defined]


def of_variable(network: Any, x: Tensor, scores: Tensor) -> Tensor:
    number = 0

    def look(scores: Tensor) -> Tensor:
        nonlocal number
        number = int(scores.max())
        return scores

    look(scores)
    return turned(x, number > 1e9)


def of_target(network: Any, x: Tensor, scores: Tensor) -> Tensor:
    target = torch.zeros(2)
    number_written(scores, target)
    return turned(x, target[0] > 1e9)


def taken_along(network: Any, x: Tensor, scores: Tensor) -> Tensor:
    def look(scores: Tensor) -> Tensor:
        return x.flip(1) if scores.max() > 1e9 else x

    return look(scores)


NOTES: list[float] = []


class Seen:
    largest = 0.0

    @classmethod
    def note(cls, number: float) -> None:
        Seen.largest = number


class Noted:
    numbers: ClassVar[list[float]] = []


def note(number: float) -> None:
    NOTES.append(number)


def handed_on(scores: Tensor) -> Tensor:
    note(float(scores.max()))
    return scores


def handed_to(scores: Tensor, tell: Callable[[float], None]) -> Tensor:
    tell(float(scores.max()))
    return scores


def of_global_list(network: Any, x: Tensor, scores: Tensor) -> Tensor:
    NOTES.clear()
    handed_on(scores)
    return turned(x, NOTES[0] > 1e9)


def of_function_given(network: Any, x: Tensor, scores: Tensor) -> Tensor:
    NOTES.clear()
    handed_to(scores, note)
    return turned(x, NOTES[0] > 1e9)


def of_method_given(network: Any, x: Tensor, scores: Tensor) -> Tensor:
    NOTES.clear()
    handed_to(scores, NOTES.append)
    return turned(x, NOTES[0] > 1e9)


def of_class(network: Any, x: Tensor, scores: Tensor) -> Tensor:
    handed_to(scores, Seen().note)
    return turned(x, Seen.largest > 1e9)


class Telling:
    def __call__(self, number: float) -> None:
        NOTES.append(number)


def of_object_called(network: Any, x: Tensor, scores: Tensor) -> Tensor:
    NOTES.clear()
    handed_to(scores, Telling())
    return turned(x, NOTES[0] > 1e9)


def of_list_of_class(network: Any, x: Tensor, scores: Tensor) -> Tensor:
    Noted.numbers.clear()
    handed_to(scores, lambda number: Noted.numbers.append(number))
    return turned(x, Noted.numbers[0] > 1e9)


def seeded(scores: Tensor) -> Tensor:
    random.seed(int(scores.max()))
    return scores


def of_random_state(network: Any, x: Tensor, scores: Tensor) -> Tensor:
    seeded(scores)
    return turned(x, random.random() > 2)


def bound(x: Tensor, scores: Tensor) -> Tensor:
    return partial(turned_if_large, x)(scores)


DECIDING: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "in forward": lambda network, x, scores: turned(x, scores.max() > 1e9),
    "by what a function returns": lambda network, x, scores: turned(x, is_large(scores)),
    "by a list of numbers": lambda network, x, scores: turned(x, max([int(score) for score in scores]) > 1e9),
    "by what a generator yields": lambda network, x, scores: turned(x, max(one_by_one(scores)) > 1e9),
    "by whether anything is returned": lambda network, x, scores: turned(x, none_if_small(scores) is not None),
    "by a tensor of the number": lambda network, x, scores: turned(x, number_as_tensor(scores) > 1e9),
    "by a number that is written to a tensor": of_target,
    "by what is raised": of_either,
    "by a list that is added to": of_notes,
    "by an attribute": of_attribute,
    "by a variable": of_variable,
    "by a global list that another function adds to": of_global_list,
    "by one that a function which is given adds to": of_function_given,
    "by a list whose method is given": of_method_given,
    "by a variable of a class": of_class,
    "by an object that is called": of_object_called,
    "by a list of a class": of_list_of_class,
    "by the state of random numbers": of_random_state,
    "in a function that is given the channels": lambda network, x, scores: turned_if_large(x, scores),
    "in a function that is given them in an object": lambda network, x, scores: turned_if_far(Found(x, scores)),
    "in a function that has taken them along": taken_along,
    "in a function that is bound to them": lambda network, x, scores: bound(x, scores),
}


@pytest.mark.parametrize("case", DECIDING)
def test_what_code_can_decide_about_that_has_looked_is_unprunable(case: str) -> None:
    graph = lp.trace(Looking(DECIDING[case]), torch.randn(4, 5))
    assert "stem" not in graph.groups
    assert graph.unprunable["stem"].reason.endswith(REASON)


def runs_a_layer(scores: Tensor) -> Tensor:
    return LAYERS(scores) if int(scores.max()) < 1e9 else scores


LAYERS = nn.Sequential(nn.Linear(1, 6), nn.Linear(6, 1))


def test_a_function_that_has_looked_and_runs_a_layer_decides_about_the_module() -> None:
    model = Looking(lambda network, x, scores: x * runs_a_layer(scores))
    model.layers = LAYERS
    assert not lp.trace(model, torch.randn(4, 5)).groups


def pasted(box: Tensor, size: int) -> Tensor:
    start, stop = sorted(int(place) % size for place in box)
    canvas = torch.zeros(size, dtype=box.dtype)
    canvas[start : stop + 1] = functional.interpolate(box[None, None], stop + 1 - start)[0, 0]
    return canvas


def paste_all(boxes: Tensor, sizes: list[int]) -> Tensor:
    rows = [pasted(box, sizes[0]) for box in boxes]
    return torch.stack(rows) if rows else boxes.new_empty(0, sizes[0])


class TwoStages(nn.Module):
    """Finds boxes, looks at their features again, and pastes each box that it finds where it lies."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.second, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        rows = self.stem(x).relu().flatten(2)[0].T
        boxes = self.head(self.second(rows).relu()) * 4
        found = boxes[boxes[:, 0] > boxes[:, 0].mean()]
        return found, paste_all(found, [12])


@pytest.mark.parametrize("seed", range(4))
def test_boxes_that_are_pasted_one_by_one_hold_no_channels(seed: int) -> None:
    torch.manual_seed(seed)
    model = randomised(TwoStages().double()).eval()
    x = torch.randn(1, 3, 7, 7, dtype=torch.float64)
    assert 0 < len(model(x)[0]) < 25
    graph = lp.trace(model, x)
    assert graph.groups.keys() == {"stem", "second"}
    assert difference(model, graph, random_plan(graph), x) <= 1e-9


def small_detector(kind: str) -> nn.Module:
    """Build a detector of torchvision with a backbone of two convolutions, which finds nine boxes, right or wrong."""
    detection = pytest.importorskip("torchvision.models.detection")
    pool = partial(pytest.importorskip("torchvision.ops").MultiScaleRoIAlign, ["0"], 4, 2)
    backbone = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 12, 3, 2, 1), nn.ReLU())
    backbone.out_channels = 12
    settings: dict[str, Any] = {
        "rpn_anchor_generator": detection.anchor_utils.AnchorGenerator(((8, 16, 32),), ((1.0,),)),
        "box_head": detection.faster_rcnn.TwoMLPHead(192, 16),
        "box_predictor": detection.faster_rcnn.FastRCNNPredictor(16, 3),
        "box_roi_pool": pool(),
    }
    if kind == "mask":
        settings["mask_head"] = detection.mask_rcnn.MaskRCNNHeads(12, (8, 8), 1)
        settings["mask_predictor"] = detection.mask_rcnn.MaskRCNNPredictor(8, 8, 3)
        make = partial(detection.MaskRCNN, mask_roi_pool=pool())
    else:
        settings["keypoint_head"] = detection.keypoint_rcnn.KeypointRCNNHeads(12, (8, 8))
        settings["keypoint_predictor"] = detection.keypoint_rcnn.KeypointRCNNPredictor(8, 5)
        make = partial(detection.KeypointRCNN, keypoint_roi_pool=pool())
    limits = {"rpn_post_nms_top_n_test": 30, "box_detections_per_img": 9, "box_score_thresh": 0.2}
    return make(backbone, None, min_size=64, max_size=64, **limits, **settings)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["mask", "keypoint"])
def test_detectors_that_paste_what_they_find_are_prunable_but_for_their_outputs(kind: str, seed: int) -> None:
    torch.manual_seed(seed)
    detector = small_detector(kind).double().eval()
    images = ([torch.rand(3, 64, 64, dtype=torch.float64)],)
    assert len(detector(*images)[0]["boxes"]) == 9
    graph = lp.trace(detector, images)
    assert {name.rpartition(".")[2].partition("#")[0] for name in graph.unprunable} <= {
        "cls_logits", "bbox_pred", "cls_score", "mask_fcn_logits", "kps_score_lowres",
    }  # fmt: skip
    assert len(graph.groups) == {"mask": 8, "keypoint": 7}[kind]
    assert difference(detector, graph, random_plan(graph, exact_only=True), images) <= 1e-9


def test_who_traces_functions_goes_on_to() -> None:
    model, x = TwoStages().double().eval(), torch.randn(1, 3, 7, 7, dtype=torch.float64)
    called = []

    def note(frame: Any, event: str, value: Any) -> None:
        called.append(event)

    before = sys.gettrace()
    sys.settrace(note)
    try:
        graph = lp.trace(model, x)
        assert sys.gettrace() is note
    finally:
        sys.settrace(before)
    assert called
    assert graph.groups.keys() == lp.trace(model, x).groups.keys()
    assert sys.gettrace() is before
