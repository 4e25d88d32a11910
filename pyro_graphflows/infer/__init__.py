"""Training and evaluation of guides; works with any Pyro guide."""

from pyro_graphflows.infer.batched_hmc import HMC, NUTS
from pyro_graphflows.infer.batches import TrainingData
from pyro_graphflows.infer.calibration import (
    CalibrationReport,
    calibration_report,
    sbc_ranks,
    sbc_uniformity,
    tarp_ranks,
)
from pyro_graphflows.infer.chains import Chains
from pyro_graphflows.infer.checkpoints import Checkpoint
from pyro_graphflows.infer.classifier_test import c2st
from pyro_graphflows.infer.comparison import compare, stacking_weights
from pyro_graphflows.infer.compiled import CompiledLoss
from pyro_graphflows.infer.compiled_elbo import CompiledELBO
from pyro_graphflows.infer.coverage import Coverage, coverage
from pyro_graphflows.infer.evidence import Evidence, importance_log_weights, log_evidence
from pyro_graphflows.infer.fixed_simulations import Simulations
from pyro_graphflows.infer.gap import Gap
from pyro_graphflows.infer.history import History, Progress
from pyro_graphflows.infer.inference_compilation import InferenceCompilation
from pyro_graphflows.infer.iwae import IWAE_ELBO
from pyro_graphflows.infer.loo import LOO
from pyro_graphflows.infer.optimizers import default_optimizer
from pyro_graphflows.infer.posterior import Posterior, load_posterior, sample_posterior
from pyro_graphflows.infer.predictive import Prediction
from pyro_graphflows.infer.psis import effective_sample_size, psis_khat
from pyro_graphflows.infer.schedule import Schedule
from pyro_graphflows.infer.training import fit

__all__ = [
    "HMC",
    "IWAE_ELBO",
    "LOO",
    "NUTS",
    "CalibrationReport",
    "Chains",
    "Checkpoint",
    "CompiledELBO",
    "CompiledLoss",
    "Coverage",
    "Evidence",
    "Gap",
    "History",
    "InferenceCompilation",
    "Posterior",
    "Prediction",
    "Progress",
    "Schedule",
    "Simulations",
    "TrainingData",
    "c2st",
    "calibration_report",
    "compare",
    "coverage",
    "default_optimizer",
    "effective_sample_size",
    "fit",
    "importance_log_weights",
    "load_posterior",
    "log_evidence",
    "psis_khat",
    "sample_posterior",
    "sbc_ranks",
    "sbc_uniformity",
    "stacking_weights",
    "tarp_ranks",
]
