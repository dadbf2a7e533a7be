#!/usr/bin/env bash
# Runs a training command and says by the exit code whether it has to be started again.
#
#   again.sh python -m train.distill configs/distill_pod.py --out runs/distill --cluster
#
# SIGTERM is passed on: the command finishes its step, saves it and leaves. Then the exit code is
# 75, so that whatever restarts what fails starts it again, and the same command goes on where it
# was saved. 0: all steps are done. Else: its own error. ON_AGAIN is run before a 75, and ON_TERM
# instead of passing SIGTERM on. Do not use it with --resume-step, which would go back each time.
set -u
asked=
trap 'asked=1; if [ -n "${ON_TERM:-}" ]; then eval "$ON_TERM"; else kill -TERM "$child" 2>/dev/null; fi' TERM
"$@" &
child=$!
while kill -0 "$child" 2>/dev/null; do wait "$child"; done # a signal ends `wait` early
wait "$child"
code=$?
if [ -n "$asked" ] && { [ "$code" -eq 0 ] || [ "$code" -eq 143 ]; }; then # 143: not begun yet
  if [ -n "${ON_AGAIN:-}" ]; then eval "$ON_AGAIN"; fi
  exit 75
fi
exit "$code"
