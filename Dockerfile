# The service of docs/from-csv-to-service.md:
#   docker build --tag sst2-xlmr . && docker run --publish 8000:8000 --volume "$PWD/runs/reviews/model:/model:ro" sst2-xlmr
FROM python:3.12-slim
# The engine is compiled when the service starts.
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
ENV PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu PIP_NO_CACHE_DIR=1
WORKDIR /app
COPY pyproject.toml README.md LICENSE ./
COPY constraints constraints
COPY sst2_xlmr sst2_xlmr
RUN pip install --constraint constraints/newest.txt ".[serve]" && useradd --create-home service
USER service
EXPOSE 8000
ENTRYPOINT ["sst2-xlmr", "serve", "--model", "/model", "--host", "0.0.0.0"]
