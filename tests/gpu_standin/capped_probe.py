"""The product's own probe over the stand-in driver, attached to the stand-in daemon, whose caps it sees."""

from __future__ import annotations

import json
import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))

from tests.gpu_standin.mps_client import TOTAL_SMS, attach
from tuner_server.gpu import probe

_server, sms = attach() if "CUDA_MPS_PIPE_DIRECTORY" in os.environ else (None, TOTAL_SMS)
try:
    answer = {**probe.read_device(), "sm_count": sms}
except probe.DriverError as error:
    answer = {"error": str(error)}
print(json.dumps(answer))
