/** The service, as this package calls it. */
import { readFileSync } from "node:fs";

import { credentials, Metadata, status, type ChannelCredentials, type ServiceError } from "@grpc/grpc-js";

import { ResumedError } from "./errors.js";
import type { Duration } from "./v1/google/protobuf/duration.js";
import { SessionStoreServiceClient, type BatchOperation, type BatchResult } from "./v1/resumed/v1/session_store.js";

/** TLS to the store: each a PEM file or its content. They are read once. */
export interface Tls {
  /** Certificates of the authorities that the store's certificate may come from. */
  ca: string | Buffer;
  /** The certificate that this frontend shows, and its key. */
  cert?: string | Buffer;
  key?: string | Buffer;
}

/**
 * Get alone is retried by gRPC: after an unknown outcome a second Take misses, where an error tells the truth, and Batches are
 * sent again by the sender.
 */
const SERVICE_CONFIG = JSON.stringify({
  loadBalancingConfig: [{ round_robin: {} }],
  methodConfig: [
    {
      name: [{ service: "resumed.v1.SessionStoreService", method: "Get" }],
      retryPolicy: {
        maxAttempts: 3,
        initialBackoff: "0.005s",
        maxBackoff: "0.02s",
        backoffMultiplier: 2,
        retryableStatusCodes: ["UNAVAILABLE"],
      },
    },
  ],
});

const OPTIONS = {
  "grpc.service_config": SERVICE_CONFIG,
  // A store that comes back is found again within a second or two.
  "grpc.initial_reconnect_backoff_ms": 100,
  "grpc.max_reconnect_backoff_ms": 1000,
  // A store that vanished without a word (a node that lost power) is noticed without traffic to it.
  "grpc.keepalive_time_ms": 30_000,
  "grpc.keepalive_timeout_ms": 5000,
  // The store is part of the fleet; proxies are for the world outside.
  "grpc.enable_http_proxy": 0,
  // A frontend that had no traffic for a while resumes its next client as fast as any other.
  "grpc.client_idle_timeout_ms": 2 ** 31 - 1,
};

/** A call that failed, and the reason under which a look-up is counted that it made miss. */
export class CallError extends Error {
  override name = "CallError";
  readonly reason: "late" | "down" | "limited" | "refused";

  constructor(error: ServiceError) {
    super(`${status[error.code]}: ${error.details}`);
    this.reason =
      error.code === status.DEADLINE_EXCEEDED
        ? "late"
        : error.code === status.UNAVAILABLE || error.code === status.CANCELLED
          ? "down"
          : error.code === status.RESOURCE_EXHAUSTED
            ? "limited"
            : "refused";
  }
}

/** What the rest of this package needs of a store; all times are milliseconds, and a call that fails rejects with CallError. */
export interface Store {
  readonly namespace: string;
  get(key: Buffer, timeout: number): Promise<Buffer | undefined>;
  take(key: Buffer, timeout: number): Promise<Buffer | undefined>;
  batch(operations: BatchOperation[], timeout: number): Promise<BatchResult[]>;
  close(): void;
}

export class GrpcStore implements Store {
  readonly namespace: string;
  readonly #client: SessionStoreServiceClient;

  constructor(target: string, namespace: string, tls?: Tls) {
    this.namespace = namespace;
    this.#client = new SessionStoreServiceClient(target, tls ? channelCredentials(tls) : credentials.createInsecure(), OPTIONS);
    this.#client.getChannel().getConnectivityState(true); // connects
  }

  async get(key: Buffer, timeout: number): Promise<Buffer | undefined> {
    const request = { namespace: this.namespace, key };
    const { session } = await unary(this.#client.get.bind(this.#client), request, timeout);
    return session?.value;
  }

  async take(key: Buffer, timeout: number): Promise<Buffer | undefined> {
    const request = { namespace: this.namespace, key };
    const { session } = await unary(this.#client.take.bind(this.#client), request, timeout);
    return session?.value;
  }

  async batch(operations: BatchOperation[], timeout: number): Promise<BatchResult[]> {
    const { results } = await unary(this.#client.batch.bind(this.#client), { operations }, timeout);
    return results;
  }

  close(): void {
    this.#client.close();
  }
}

/** As protobuf has a Duration, and a Timestamp of Unix seconds. */
export function duration(seconds: number): Duration {
  return { seconds: Math.floor(seconds), nanos: Math.floor((seconds % 1) * 1e9) };
}

type Method<Request, Response> = (
  request: Request,
  metadata: Metadata,
  options: { deadline: number },
  callback: (error: ServiceError | null, response: Response) => void,
) => unknown;

function unary<Request, Response>(method: Method<Request, Response>, request: Request, timeout: number): Promise<Response> {
  return new Promise((resolve, reject) => {
    method(request, new Metadata(), { deadline: Date.now() + timeout }, (error, response) => {
      if (error) reject(new CallError(error));
      else resolve(response);
    });
  });
}

function channelCredentials({ ca, cert, key }: Tls): ChannelCredentials {
  try {
    return credentials.createSsl(
      content(ca),
      key === undefined ? null : content(key),
      cert === undefined ? null : content(cert),
    );
  } catch (error) {
    throw new ResumedError(`tls: ${(error as Error).message}`);
  }
}

function content(pem: string | Buffer): Buffer {
  return typeof pem === "string" && !pem.includes("-----BEGIN") ? readFileSync(pem) : Buffer.from(pem);
}
