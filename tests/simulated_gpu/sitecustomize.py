"""Python reads this file at its start when its folder is on PYTHONPATH: there is a simulated GPU from then on."""

import simulated_gpu

simulated_gpu.install()
