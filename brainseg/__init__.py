"""brainseg: brain tumour segmentation in MRI, on a Ray cluster, from training to the cohort's report."""

__version__ = "0.1.0"
