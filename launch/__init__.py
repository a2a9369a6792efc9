"""The `igrpo` command: one service per process, or all of them on this machine, supervised."""
