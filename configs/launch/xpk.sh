#!/usr/bin/env bash
# A training run on TPUs of GKE, by XPK (github.com/AI-Hypercomputer/xpk).
#
#   CLUSTER=pod IMAGE=REGISTRY/liveavatar OUT=gs://BUCKET/distill configs/launch/xpk.sh
#
# CLUSTER and IMAGE are yours; the image holds this project, installed with the extras
# `train,tpu`, and works in its root. STAGE is forcing or distill. TYPE counts cores of v5p: 64
# chips are v5p-128; those of v6e are v6e-64, with MESH=fsdp=16,sequence=4 and SET=data.batch=16.
# Two slices: SLICES=2 MESH=dcn_data=2,fsdp=64 SET=data.batch=128.
#
# Restarts: when a node is taken away its pod gets SIGTERM; all processes finish their step, save
# it and leave with 75 (see again.sh); the JobSet starts all of them again, and they go on at that
# step. GRACE seconds have to be enough for three steps (two in which
# the processes agree, and the one that runs) and a save.
set -eu
STAGE=${STAGE:-distill}
RUN="python -m train.$STAGE ${CONFIG:-configs/${STAGE}_pod.py} --out $OUT --cluster"
RUN="$RUN${MESH:+ --mesh $MESH}${SET:+ --set $SET}"
xpk workload create --cluster "$CLUSTER" --workload "${NAME:-$STAGE}" \
  --tpu-type "${TYPE:-v5p-128}" --num-slices "${SLICES:-1}" --docker-image "$IMAGE" \
  --max-restarts "${RESTARTS:-100}" --restart-on-user-code-failure \
  --termination-grace-period-seconds "${GRACE:-900}" \
  --command "bash configs/launch/again.sh $RUN"
