import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_prune.models import Distillation, ImageClassifier, build_network
from lightning_prune.models.distillation import Teacher

TINY = {"network": "digits", "num_classes": 3, "input_shape": (1, 8, 8), "network_args": {"width": 4}}


@pytest.fixture
def published(tmp_path):
    """Write the weights of a teacher."""
    network = build_network("digits", num_classes=3, in_channels=1, width=4)
    torch.save(network.state_dict(), tmp_path / "teacher.pt")
    return str(tmp_path / "teacher.pt")


def test_loss_is_that_of_the_paper():
    torch.manual_seed(0)
    student, network, images = nn.Linear(4, 3), nn.Linear(4, 3), torch.rand(5, 4)
    hard = torch.tensor(2.0)
    loss = Teacher(network, Distillation("", temperature=2.0, share=0.7)).loss(images, student(images), hard)
    expected = 0.0
    for i in range(5):
        p, q = (network(images[i]) / 2).softmax(0), (student(images[i]) / 2).softmax(0)
        expected += sum(p[k] * (p[k] / q[k]).log() for k in range(3)) / 5
    assert loss.item() == pytest.approx((0.3 * hard + 0.7 * 4 * expected).item(), rel=1e-5)


def test_gradient_of_a_large_temperature_is_that_of_matched_logits():
    # Section 2 of the paper: with zero-mean logits, T^2 x the gradient tends to (student - teacher) / classes.
    teacher, logits = nn.Identity(), torch.tensor([[1.0, 0.0, -1.0]], requires_grad=True)
    expected = torch.tensor([[-2.0, 1.0, 1.0]])
    Teacher(teacher, Distillation("", temperature=1000.0, share=1.0)).loss(expected, logits, 0.0).backward()
    assert torch.allclose(logits.grad, (logits.detach() - expected) / 3, atol=1e-2)


def test_training_step_asks_the_teacher_of_the_file(published):
    module = ImageClassifier(**TINY, distillation=Distillation(published, temperature=3.0, share=0.5)).eval()
    teacher = build_network("digits", num_classes=3, in_channels=1, width=4).eval()
    teacher.load_state_dict(torch.load(published, weights_only=True))
    images, labels = torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])
    module.log = lambda *args, **settings: None
    logits = module(images)
    soft = F.kl_div((logits / 3).log_softmax(1), (teacher(images) / 3).softmax(1), reduction="batchmean")
    expected = 0.5 * F.cross_entropy(logits, labels) + 0.5 * 9 * soft
    assert module.training_step((images, labels), 0).item() == pytest.approx(expected.item(), rel=1e-4)


def test_teacher_is_no_part_of_the_module(published):
    module = ImageClassifier(**TINY, distillation={"weights": published})
    plain = ImageClassifier(**TINY)
    assert module.state_dict().keys() == plain.state_dict().keys()
    assert len(list(module.parameters())) == len(list(plain.parameters()))
    assert [name for name, _ in module.named_modules()] == [name for name, _ in plain.named_modules()]
    assert "distillation" not in module.hparams
    assert not module.teacher.network.training
    assert not any(parameter.requires_grad for parameter in module.teacher.network.parameters())
    module.train()
    assert not module.teacher.network.training


def test_module_with_a_teacher_can_be_copied_and_pickled(published):
    module = ImageClassifier(**TINY, distillation={"weights": published})
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert twin.teacher.network is not module.teacher.network
        assert torch.equal(twin.teacher.network.linear.weight, module.teacher.network.linear.weight)


def test_teacher_follows_the_type_of_the_images():
    teacher = Teacher(nn.Linear(4, 3), Distillation("", share=1.0))
    images = torch.rand(2, 4, dtype=torch.float64)
    assert teacher.loss(images, torch.rand(2, 3, dtype=torch.float64), torch.tensor(0.0)).dtype == torch.float64


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, "temperature=0.0 must be above 0: 4 is usual"),
        ({"share": 0.0}, r"share=0.0 is outside \(0, 1\]: set `distillation` to null for no teacher"),
        ({"share": 1.5}, r"share=1.5 is outside \(0, 1\]"),
    ],
)
def test_bad_setting_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Distillation("file", **settings)
