"""What has to be so before any test is imported."""

import torchvision_ops

torchvision_ops.declare()
