"""For the test environment alone: lets the only published torchvision be imported beside a CPU build of torch.

That torchvision is built for CUDA, and its first import asks for two operators which its missing library would have defined.
`make vllm-env` copies this file into site-packages with a `.pth` line that imports it. It acts on the name `torchvision` only.
"""

import sys
from importlib.abc import MetaPathFinder

OPERATORS = ("nms", "qnms")
_libraries = []


class _DefineFirst(MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            import torch

            library = torch.library.Library("torchvision", "FRAGMENT")
            for name in OPERATORS:
                library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            _libraries.append(library)  # dropped, it would take its operators along
        return None


sys.meta_path.insert(0, _DefineFirst())
