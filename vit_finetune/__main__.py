"""`python -m vit_finetune`: what `accelerate launch -m vit_finetune …` runs."""

from vit_finetune.cli import main

if __name__ == "__main__":
    main()
