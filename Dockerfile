# For a CUDA GPU; not run. PyPI's torch for Linux brings CUDA's libraries along; the host has the driver. Not the slim
# image, since torch.compile needs a C compiler.
FROM python:3.11
COPY . /modernbert-small
RUN pip install --no-cache-dir -r /modernbert-small/requirements.txt -e /modernbert-small
WORKDIR /work
ENTRYPOINT ["python", "-m", "modernbert_small.run"]
