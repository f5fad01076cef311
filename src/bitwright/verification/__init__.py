"""Is a folder or a file what it claims to be?"""
