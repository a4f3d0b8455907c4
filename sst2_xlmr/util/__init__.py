"""What every other part uses: files, processes, errors, memory, downloads."""
