# yolo_ext on CPUs: docker build -t yolo-ext . && docker run --rm -v "$PWD:/data" yolo-ext compress model=best.pt data=data.yaml
FROM python:3.12-slim-bookworm
RUN apt-get update && apt-get install -y --no-install-recommends libgl1 libglib2.0-0 && rm -rf /var/lib/apt/lists/*
# With --build-arg TORCH_INDEX=URL of PyTorch's builds for CPUs, the image is a tenth of the size.
ARG TORCH_INDEX
RUN pip install --no-cache-dir torch torchvision ${TORCH_INDEX:+--index-url $TORCH_INDEX}
COPY . /src
RUN pip install --no-cache-dir '/src[openvino]' && rm -rf /src
ENV YOLO_AUTOINSTALL=false YOLO_CONFIG_DIR=/tmp
WORKDIR /data
ENTRYPOINT ["yolo-ext"]
CMD ["help"]
