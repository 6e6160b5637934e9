#!/usr/bin/env bash
# Trains on one node or several. Run it on every node, with the address of the first node in HEAD:
#
#     docs/examples/torchrun.sh --config my.yaml                                    # one node, all of its GPUs
#     NNODES=2 NODE_RANK=0 HEAD=10.0.0.1 docs/examples/torchrun.sh --config my.yaml
#     NNODES=2 NODE_RANK=1 HEAD=10.0.0.1 docs/examples/torchrun.sh --config my.yaml
#
# It takes the options of `lit-lora fit`. After a failure, the same command resumes from the last checkpoint in OUTPUT, a
# folder that all nodes share; another training needs another OUTPUT.
set -euo pipefail

NNODES=${NNODES:-1}
NODE_RANK=${NODE_RANK:-0}
NPROC_PER_NODE=${NPROC_PER_NODE:-$(python3 -c "import torch; print(torch.cuda.device_count())")}
HEAD=${HEAD:-localhost}
PORT=${PORT:-29500}
OUTPUT=${OUTPUT:-runs/torchrun}

exec torchrun --nnodes "$NNODES" --node_rank "$NODE_RANK" --nproc_per_node "$NPROC_PER_NODE" \
    --master_addr "$HEAD" --master_port "$PORT" --no_python \
    lit-lora fit "$@" --trainer.num_nodes "$NNODES" --trainer.devices "$NPROC_PER_NODE" \
    --trainer.default_root_dir "$OUTPUT" --ckpt_path last
