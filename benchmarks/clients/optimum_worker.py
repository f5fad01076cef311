"""transformers with gptqmodel and optimum beside it: folders in gptq and awq.

    python3.11 -m venv ENV
    ENV/bin/pip install torch==2.13.0
    ENV/bin/pip install gptqmodel==7.6.0 transformers==5.24.0 optimum==2.3.0

Tried with these versions. What it does is what ``transformers_worker.py`` does, in this environment.
"""

from transformers_worker import main

if __name__ == "__main__":
    main()
