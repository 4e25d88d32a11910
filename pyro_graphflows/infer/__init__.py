"""Training and evaluation of guides."""

from pyro_graphflows.infer.calibration import sbc_ranks, sbc_uniformity
from pyro_graphflows.infer.diagnostics import effective_sample_size, psis_khat
from pyro_graphflows.infer.evidence import Evidence, importance_log_weights, log_evidence
from pyro_graphflows.infer.inference_compilation import InferenceCompilation
from pyro_graphflows.infer.iwae import IWAE_ELBO
from pyro_graphflows.infer.training import History, fit

__all__ = [
    "IWAE_ELBO",
    "Evidence",
    "History",
    "InferenceCompilation",
    "effective_sample_size",
    "fit",
    "importance_log_weights",
    "log_evidence",
    "psis_khat",
    "sbc_ranks",
    "sbc_uniformity",
]
