/** The service, as this package calls it. */
import { readFileSync } from "node:fs";

import {
  credentials,
  Metadata,
  status,
  type ChannelCredentials,
  type ClientReadableStream,
  type ClientUnaryCall,
  type ServiceError,
} from "@grpc/grpc-js";

import { ResumedError } from "./errors.js";
import { Files, type Logger } from "./files.js";
import type { Duration } from "./v1/google/protobuf/duration.js";
import {
  SessionStoreServiceClient,
  type BatchOperation,
  type BatchResult,
  type WatchResponse,
} from "./v1/resumed/v1/session_store.js";

/**
 * TLS to the store: each a PEM file or its content. Files are read again when they have changed and settled for a second; calls go
 * over a new connection then. Those that cannot be used (such as a key that does not fit its certificate, in the
 * middle of a rotation) are reported, and the content that was read before stays in use.
 */
export interface Tls {
  /** Certificates of the authorities that the store's certificate may come from. */
  ca: string | Buffer;
  /** The certificate of this frontend, and its key. */
  cert?: string | Buffer;
  key?: string | Buffer;
}

/**
 * gRPC retries Get alone: after an unknown outcome a second Take would miss, and the sender repeats Batches.
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

/** How many milliseconds after its time a call must be noticed to be late, so that it was this process that stood still. */
const STALL_MS = 10;
/** How many milliseconds new credentials have to reach the store before they are used anyway. */
const RENEWAL_MS = 10_000;

/** A call that failed, and the reason under which a look-up is counted that it made miss. */
export class CallError extends Error {
  override name = "CallError";
  readonly reason: "timeout" | "unavailable" | "limited" | "rejected";
  /** Whether it is late because this process stood still (a collection, a long computation): the answer may have been there. */
  readonly stalled: boolean;

  constructor(error: Pick<ServiceError, "code" | "details">, stalled = false) {
    super(`${status[error.code]}: ${error.details}`);
    this.reason =
      error.code === status.DEADLINE_EXCEEDED
        ? "timeout"
        : error.code === status.UNAVAILABLE || error.code === status.CANCELLED
          ? "unavailable"
          : error.code === status.RESOURCE_EXHAUSTED
            ? "limited"
            : "rejected";
    this.stalled = stalled;
  }
}

/** The calls that the rest of this package makes; all times are milliseconds, and a call that fails rejects with CallError. */
export interface Store {
  readonly namespace: string;
  get(key: Buffer, timeout: number): Promise<Buffer | undefined>;
  take(key: Buffer, timeout: number): Promise<Buffer | undefined>;
  batch(operations: BatchOperation[], timeout: number): Promise<BatchResult[]>;
  /** A stream of purges and lasting removals, which ends with the connection. */
  watchRemovals(): ClientReadableStream<WatchResponse>;
  close(): void;
}

export class GrpcStore implements Store {
  readonly namespace: string;
  readonly #target: string;
  readonly #tls: Tls | undefined;
  readonly #files: Files | undefined;
  #client: SessionStoreServiceClient;
  /** That with new credentials, until it has a connection. */
  #next: SessionStoreServiceClient | undefined;

  constructor(target: string, namespace: string, tls?: Tls, logger: Logger = console) {
    this.namespace = namespace;
    this.#target = target;
    this.#tls = tls;
    const paths = tls ? [tls.ca, tls.cert, tls.key].filter(isPath) : [];
    if (paths.length > 0) this.#files = new Files("tls:", paths, logger);
    this.#client = this.#connect();
  }

  async get(key: Buffer, timeout: number): Promise<Buffer | undefined> {
    const client = this.#current();
    const { session } = await unary(client.get.bind(client), { namespace: this.namespace, key }, timeout);
    return session?.value;
  }

  async take(key: Buffer, timeout: number): Promise<Buffer | undefined> {
    const client = this.#current();
    const { session } = await unary(client.take.bind(client), { namespace: this.namespace, key }, timeout);
    return session?.value;
  }

  async batch(operations: BatchOperation[], timeout: number): Promise<BatchResult[]> {
    const client = this.#current();
    const { results } = await unary(client.batch.bind(client), { operations }, timeout);
    return results;
  }

  watchRemovals(): ClientReadableStream<WatchResponse> {
    return this.#current().watch({ namespace: this.namespace, position: Buffer.alloc(0), removalsOnly: true });
  }

  close(): void {
    this.#client.close();
    this.#next?.close();
    this.#next = undefined;
  }

  #connect(): SessionStoreServiceClient {
    const secured = this.#tls ? channelCredentials(this.#tls) : credentials.createInsecure();
    const client = new SessionStoreServiceClient(this.#target, secured, OPTIONS);
    client.getChannel().getConnectivityState(true); // connects
    return client;
  }

  #current(): SessionStoreServiceClient {
    this.#files?.follow(() => {
      this.#renew(this.#connect());
      return "";
    });
    return this.#client;
  }

  /** Has calls go through another client, once it has a connection; calls under way go on. */
  #renew(next: SessionStoreServiceClient): void {
    this.#next?.close();
    this.#next = next;
    next.waitForReady(Date.now() + RENEWAL_MS, () => {
      if (this.#next !== next) return; // closed
      this.#next = undefined;
      this.#client.close();
      this.#client = next;
    });
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
) => ClientUnaryCall;

/**
 * After a stall an event loop runs its timers before it reads its sockets. So a call that is late waits until the sockets were read,
 * and a little longer after a stall, before it ends.
 */
function unary<Request, Response>(method: Method<Request, Response>, request: Request, timeout: number): Promise<Response> {
  return new Promise((resolve, reject) => {
    const end = performance.now() + timeout;
    let [late, stalled] = [false, false];
    const deadline = Date.now() + timeout + 2 * STALL_MS; // of the store; the caller's is the timer's
    const call = method(request, new Metadata(), { deadline }, (error, response) => {
      clearTimeout(timer);
      if (!error) resolve(response);
      else reject(new CallError(late ? { code: status.DEADLINE_EXCEEDED, details: "of this process" } : error, stalled));
    });
    const giveUp = (): void => {
      late = true;
      call.cancel();
    };
    let timer = setTimeout(() => {
      stalled = performance.now() - end >= STALL_MS;
      timer = setTimeout(giveUp, stalled ? STALL_MS : 1);
    }, timeout);
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
  return isPath(pem) ? readFileSync(pem) : Buffer.from(pem);
}

function isPath(pem: string | Buffer | undefined): pem is string {
  return typeof pem === "string" && !pem.includes("-----BEGIN");
}
