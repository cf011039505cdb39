"""Calibration and evaluation samples: arrays, images or a generator, streamed one sample at a time, never pickle."""

from normfuse.data.binding import InputSpec, check_samples
from normfuse.data.in_memory import Data
from normfuse.data.opening import load_samples
from normfuse.data.preprocess import Preprocess
from normfuse.data.samples import Batch, Sample, Samples
from normfuse.data.survey import survey_calibration, survey_evaluation

__all__ = [
    "Batch",
    "Data",
    "InputSpec",
    "Preprocess",
    "Sample",
    "Samples",
    "check_samples",
    "load_samples",
    "survey_calibration",
    "survey_evaluation",
]
