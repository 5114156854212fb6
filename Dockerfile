# The main job in a container:  docker build -t lit-methods . && docker run --rm -v "$PWD/runs:/work/runs" lit-methods
# With GPUs: docker run --gpus all ... lit-methods lit fit --config configs/superflow.yaml --config configs/trainer/gpu.yaml
FROM python:3.11-slim
RUN apt-get update && apt-get install --yes --no-install-recommends git && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
RUN pip install --no-cache-dir ".[lidar]"
WORKDIR /work
CMD ["lit", "fit", "--config", "configs/superflow.yaml"]
