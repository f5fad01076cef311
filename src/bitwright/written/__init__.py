"""The output: parts, sidecar files, the account, and how a result is finished."""
