# On the Hub the real file lies beside modeling_icae.py; in this package it lives one folder up. Never uploaded.
from icae.configuration_icae.configuration_icae import TASKS, ICAEConfig  # noqa: F401
