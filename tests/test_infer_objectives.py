import pytest
from infer_models import LinearGuide, normal_model
from pyro.infer import Trace_ELBO

from pyro_graphflows.errors import GraphflowsError
from pyro_graphflows.infer.inference_compilation import InferenceCompilation
from pyro_graphflows.infer.objectives import Objective


@pytest.mark.parametrize("loss", [Trace_ELBO, 3, lambda: 1.0])
def test_other_losses_are_refused(loss):
    with pytest.raises(GraphflowsError, match="Expected loss to be 'auto', an ELBO object"):
        Objective(normal_model, LinearGuide(), loss)


def test_inference_compilation_of_another_pair():
    compilation = InferenceCompilation(normal_model, LinearGuide())
    with pytest.raises(GraphflowsError, match="got one of another pair"):
        Objective(normal_model, LinearGuide(), compilation)


def test_the_class_stands_for_an_object_with_its_defaults():
    guide = LinearGuide()
    objective = Objective(normal_model, guide, InferenceCompilation)
    assert objective.compiles
    assert objective.estimator.batch_size == InferenceCompilation(normal_model, guide).batch_size
    assert isinstance(Objective(normal_model, guide, None).estimator, Trace_ELBO)
