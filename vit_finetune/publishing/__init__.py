"""Papers about a finished run, from its folder alone and without torch: report.html and the model card."""

from vit_finetune.publishing.card import build_card, write_card
from vit_finetune.publishing.report import build_report, write_report

__all__ = ["build_card", "build_report", "write_card", "write_report"]
