"""The tests of gpt_image2: `python3 -m unittest` in the folder above runs them all."""
