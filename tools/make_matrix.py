"""Make the environments of the matrix of releases: .matrix/NAME from requirements/matrix/NAME.txt.

    python tools/make_matrix.py [NAME ...]

As ``make_clients.py`` does it for the clients.
"""

import sys

from make_clients import ROOT, make_all

REQUIREMENTS, ENVIRONMENTS = ROOT / "requirements" / "matrix", ROOT / ".matrix"

if __name__ == "__main__":
    make_all(sys.argv[1:], REQUIREMENTS, ENVIRONMENTS)
