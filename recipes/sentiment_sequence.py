"""Fine-tune one classifier over a sequence of text tasks, and show what it kept: `classp_hf/demo.py` is the code.

accelerate launch recipes/sentiment_sequence.py
accelerate launch recipes/sentiment_sequence.py --help
"""

from classp_hf.demo import main

if __name__ == "__main__":
    main()
