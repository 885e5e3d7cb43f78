"""What a launcher starts in place of `-m vit_finetune`: trains under FSDP without a GPU, and then once more, resumed.

accelerate divides a model only where it finds GPUs, though FSDP2 works over gloo, too: it is told that these are some.
"""

from __future__ import annotations

import shutil
import sys

from accelerate import PartialState
from accelerate.utils import DistributedType

from vit_finetune.finetuning import finetune
from vit_finetune.recipe import load_recipe
from vit_finetune.training.checkpoints import list_checkpoints, remove_checkpoint

form = PartialState.__init__


def form_for_fsdp(self: PartialState, *args: object, **kwargs: object) -> None:
    form(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU


PartialState.__init__ = form_for_fsdp
recipe = load_recipe(sys.argv[1])
run = finetune(recipe)
world = PartialState()
if world.is_main_process:
    shutil.copytree(run.path, sys.argv[2])
    for checkpoint in list_checkpoints(run.checkpoints)[1:]:
        remove_checkpoint(checkpoint)
    run.report_html.unlink()
    shutil.rmtree(run.model)
world.wait_for_everyone()
finetune(recipe, resume=True)
world.wait_for_everyone()
world.destroy_process_group()
