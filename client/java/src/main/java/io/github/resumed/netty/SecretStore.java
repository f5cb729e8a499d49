package io.github.resumed.netty;

import com.google.protobuf.ByteString;
import com.google.protobuf.Duration;
import com.google.protobuf.Timestamp;
import com.google.rpc.Code;
import io.github.resumed.v1.BatchOperation;
import io.github.resumed.v1.BatchRequest;
import io.github.resumed.v1.BatchResult;
import io.github.resumed.v1.GetRequest;
import io.github.resumed.v1.PutRequest;
import io.github.resumed.v1.SessionStoreServiceGrpc;
import io.github.resumed.v1.SessionStoreServiceGrpc.SessionStoreServiceBlockingStub;
import io.grpc.Channel;
import java.util.List;
import java.util.Optional;
import java.util.concurrent.TimeUnit;

/** The ticket secrets of a namespace in the store: sealed values at write-once keys. */
final class SecretStore {
    static final long DEADLINE_MILLISECONDS = 1000;

    private final SessionStoreServiceBlockingStub stub;
    private final String namespace;

    SecretStore(Channel channel, String namespace) {
        this.stub = SessionStoreServiceGrpc.newBlockingStub(channel);
        this.namespace = namespace;
    }

    /** A sealed value for the store; times are those of {@link TicketSecret}. */
    record Sealed(byte[] key, byte[] value, long ttlMilliseconds, long createdMicroseconds) {}

    /** Returns the values of keys, in the same order; empty where there is none. */
    List<Optional<byte[]>> get(List<byte[]> keys) {
        return call(keys.stream().map(this::getOf).toList()).stream().map(SecretStore::valueOf).toList();
    }

    /** Returns whether the store accepted each value, in the same order; it did not where the key has another value, or had one. */
    List<Boolean> put(List<Sealed> values) {
        return call(values.stream().map(this::putOf).toList()).stream().map(SecretStore::accepted).toList();
    }

    private List<BatchResult> call(List<BatchOperation> operations) {
        if (operations.isEmpty()) return List.of();
        BatchRequest request = BatchRequest.newBuilder().addAllOperations(operations).build();
        List<BatchResult> results =
                stub.withDeadlineAfter(DEADLINE_MILLISECONDS, TimeUnit.MILLISECONDS).batch(request).getResultsList();
        if (results.size() != operations.size()) throw new IllegalStateException("the store's response is incomplete");
        return results;
    }

    private BatchOperation getOf(byte[] key) {
        GetRequest get = GetRequest.newBuilder().setNamespace(namespace).setKey(ByteString.copyFrom(key)).build();
        return BatchOperation.newBuilder().setGet(get).build();
    }

    private BatchOperation putOf(Sealed sealed) {
        PutRequest put =
                PutRequest.newBuilder()
                        .setNamespace(namespace)
                        .setKey(ByteString.copyFrom(sealed.key))
                        .setValue(ByteString.copyFrom(sealed.value))
                        .setTtl(durationOf(sealed.ttlMilliseconds))
                        .setIssueTime(timestampOf(sealed.createdMicroseconds))
                        .setPinned(true)
                        .build();
        return BatchOperation.newBuilder().setPut(put).build();
    }

    private static Optional<byte[]> valueOf(BatchResult result) {
        if (!result.hasGet()) throw failureOf(result);
        return result.getGet().hasSession() ? Optional.of(result.getGet().getSession().getValue().toByteArray()) : Optional.empty();
    }

    private static boolean accepted(BatchResult result) {
        if (result.hasError() && result.getError().getCode() == Code.ALREADY_EXISTS_VALUE) return false;
        if (!result.hasPut()) throw failureOf(result);
        return true;
    }

    private static RuntimeException failureOf(BatchResult result) {
        return new IllegalStateException(
                result.hasError() ? "the store refuses: " + result.getError().getMessage() : "the store's response is incomplete");
    }

    private static Duration durationOf(long milliseconds) {
        return Duration.newBuilder()
                .setSeconds(Math.floorDiv(milliseconds, 1000L))
                .setNanos((int) Math.floorMod(milliseconds, 1000L) * 1_000_000)
                .build();
    }

    private static Timestamp timestampOf(long microseconds) {
        return Timestamp.newBuilder()
                .setSeconds(Math.floorDiv(microseconds, 1_000_000L))
                .setNanos((int) Math.floorMod(microseconds, 1_000_000L) * 1000)
                .build();
    }
}
